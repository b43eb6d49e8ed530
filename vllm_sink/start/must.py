"""The shape that every refusal has."""


def must(ok: bool, name: str, constraint: str, got: object, remedy: str) -> None:
    """Refuse a setting that can't be honoured, unless ``ok``.

    Args:
        name: The setting.
        constraint: What it must do or be: "be 1 with …".
        got: What it is, as shown to the user.
        remedy: What to do, in words that can be typed.

    Raises:
        ValueError: ``<name> must <constraint>, got <got>; <remedy>``.
    """
    if not ok:
        raise ValueError(f"{name} must {constraint}, got {got}; {remedy}")
