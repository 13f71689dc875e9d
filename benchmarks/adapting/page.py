"""The page."""

from poise.compare.results import Results
from collections.abc import Mapping

def page(found: Mapping[str, Results]) -> str:
    return ""
