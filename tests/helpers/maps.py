"""Maps of this process, as /proc lists them."""

from pathlib import Path

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")

HUGE = SWITCH.is_file() and "[never]" not in SWITCH.read_text()
"""Whether the system gives huge pages."""


def mapped(address):
    """Sizes, in kilobytes, of the map on which ``address`` lies; {} of none."""
    sizes, inside = {}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            low, high = (int(address, 16) for address in name.split("-"))
            inside = low <= address < high
        elif inside and rest[-1] == "kB":
            sizes[name[:-1]] = int(rest[0])
    return sizes
