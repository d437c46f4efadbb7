"""Numbers as a report writes them."""


def decimal(value: float) -> str:
    """Three digits that matter, never an exponent for everyday sizes."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def percent(value: float) -> str:
    """A share in percent, with a tenth only where it says something."""
    return f"{100 * value:.1f} %" if 0.99 <= value < 1 or 0 < value <= 0.01 else f"{100 * value:.0f} %"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    return (
        f"{whole // 60} min {whole % 60:02d} s" if whole < 6000 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    )
