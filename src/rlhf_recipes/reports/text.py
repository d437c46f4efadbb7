"""Numbers as text, the way people read them."""


def decimal(value: float) -> str:
    """Return a number with about three significant digits and without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def percent(value: float) -> str:
    """Return a share in percent; close to 0 and to 1 with one decimal."""
    return f"{100 * value:.1f} %" if 0.99 <= value < 1 or 0 < value <= 0.01 else f"{100 * value:.0f} %"


def duration(seconds: float) -> str:
    """Return seconds as seconds, minutes or hours: `88 s`, `4 min 14 s`, `2 h 02 min`."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    return (
        f"{whole // 60} min {whole % 60:02d} s" if whole < 6000 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    )
