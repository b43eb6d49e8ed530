"""Keys of ``additional_config`` that are mistaken for the ``sink`` section."""

import pytest

from vllm_sink.start.lookalikes import refuse_lookalikes

OURS = {"num_sink_tokens": 4, "window_size": 60}


def refused(additional, selected=True) -> list[str]:
    """What it is refused with; nothing if it isn't."""
    try:
        refuse_lookalikes(additional, selected=selected)
    except ValueError as error:
        return [str(error)]
    return []


@pytest.mark.parametrize(
    "key",
    [
        *("Sink", "SINK", " sink", "sinks", "sink_config", "sinkConfig"),
        *(
            "sinksettings",
            "vllm-sink",
            "vllm_sink",
            "attention_sinks",
            "sink.policy",
            "sink_tokens",
        ),
    ],
)
def test_names(key):
    (message,) = refused({key: {}})
    assert f"got {key!r} with value {{}}; rename it to 'sink'" in message
    assert not refused({key: {}}, selected=False)  # nobody asked for a policy


@pytest.mark.parametrize(
    "key", ["sinkhorn", "log_sink", "sink_url", "sync", "ascend_config", "cache", "", 7]
)
def test_other_plugins_keys(key):
    assert not refused({key: {"window_size": 4096}, "sink": OURS})


@pytest.mark.parametrize("selected", [True, False])
def test_contents(selected):
    """Settings of ours under any name, whether or not the backend is selected."""
    (message,) = refused({"streaming": OURS}, selected)
    assert message.startswith("additional_config.streaming must be the section 'sink'")
    (message,) = refused({"streaming": OURS, "sink": {}}, selected)
    assert message.endswith("; merge it into 'sink'")


def test_settings_outside_the_section():
    (message,) = refused({"window_size": 60})
    assert message.endswith('write it in the section: {"sink": {"window_size": 60}}')
    assert not refused({"window_size": 60}, selected=False)


def test_what_is_no_dict():
    assert not refused(None) and not refused(object()) and not refused({"sink": OURS})
