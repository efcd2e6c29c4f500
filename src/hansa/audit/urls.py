"""What a URL of the web is."""

from urllib.parse import SplitResult, urlsplit


def web_url(url: str) -> SplitResult | None:
    """Return the parts of a URL of http or https with a host, None of anything else."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises where it is no number, or too large
    except ValueError:
        return None
    return parts if parts.scheme in ("http", "https") and parts.hostname else None
