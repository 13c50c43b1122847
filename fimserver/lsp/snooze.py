"""Read the duration of a snooze: one rule for the relay and the server.

Standard library only: the relay imports it.
"""

DEFAULT_MINUTES = 5.0
MAX_MINUTES = 24 * 60


def parse_minutes(minutes: object) -> float:
    """Return the minutes of a snooze request; 5 for a missing number or one outside 0 to a day. 0 ends a snooze."""
    if isinstance(minutes, int | float) and not isinstance(minutes, bool) and 0 <= minutes <= MAX_MINUTES:
        return float(minutes)
    return DEFAULT_MINUTES
