"""What answering takes of energy, by codecarbon, where that is installed and can read the machine's counters."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

COUNTERS = Path("/sys/class/powercap/intel-rapl")  # without them codecarbon guesses from the processor's name


@dataclass
class Energy:
    """Watt-hours; None where they cannot be measured."""

    watt_hours: float | None = None


@contextmanager
def measured_energy(*, elsewhere: bool = False) -> Iterator[Energy]:
    """Measure what this machine takes within the block, unless others do the work."""
    found = Energy()
    if elsewhere or importlib.util.find_spec("codecarbon") is None or not COUNTERS.exists():
        yield found
        return
    from codecarbon import OfflineEmissionsTracker

    tracker = OfflineEmissionsTracker(
        country_iso_code="SWE", save_to_file=False, log_level=logging.ERROR, measure_power_secs=5
    )
    tracker.start()
    try:
        yield found
    finally:
        tracker.stop()
        found.watt_hours = 1000 * float(tracker.final_emissions_data.energy_consumed)
