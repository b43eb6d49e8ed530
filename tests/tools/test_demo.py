"""The demo's output: 80 columns, and the lines of the log that it passes on."""

from argparse import Namespace

import pytest

from scripts import demo_chat, demo_stream


def result(blocks: int, perplexity: float, lengths) -> dict:
    rows = [{"length": n, "perplexity": perplexity, "blocks": blocks} for n in lengths]
    return {"rows": rows, "seconds": 123.4, "block_size": 128}


@pytest.mark.parametrize("lengths", [demo_stream.LENGTHS, demo_stream.LENGTHS[:1]])
def test_the_report_fits_80_columns_and_ends_with_three_things(lengths):
    args = Namespace(sinks=4, window=1020, trained_length=8192)
    sink, stock = result(17, 26.93, lengths), result(1097, 52512.31, lengths)
    lines = demo_stream.report(args, sink, stock)
    assert max(map(len, lines)) <= 80
    memory, quality, time = lines[-3:]
    assert f"17 KV blocks at {lengths[-1]:,} tokens, stock 1097" in memory
    assert "perplexity 26.9" in quality and "stock 52512.3" in quality
    assert "123 s" in time
    assert ("past the trained length" in quality) == (lengths[-1] > 8192)


def test_lines_of_the_log_that_tell_of_the_loops():
    log = (
        "(EngineCore pid=9) INFO 11-28 16:20:01 [cpu.py:40] Found the attention loops "
        f"for float32 in {'/folder' * 20}, 0.3 s.\n"
        "INFO 11-28 16:20:02 [cpu.py:37] Compiled the attention loops for bfloat16 in "
        "12.3 s.\nINFO 11-28 16:20:02 [loader.py:3] Loading weights took 0.4 seconds\n"
    )
    assert demo_chat.loop_lines(log) == [
        "Found the attention loops for float32, 0.3 s.",
        "Compiled the attention loops for bfloat16 in 12.3 s.",
    ]
