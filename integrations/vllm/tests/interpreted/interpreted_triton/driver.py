"""The backend's driver, which launches nothing."""

from typing import Any

from triton.backends.driver import DriverBase


class InterpretedDriver(DriverBase):
    """Is active on every machine."""

    def __init__(self) -> None:
        pass

    @staticmethod
    def is_active() -> bool:
        return True

    def _unused(self, *args: Any) -> Any:
        raise NotImplementedError("kernels are interpreted")

    map_python_to_cpp_type = get_current_target = _unused
    get_active_torch_device = get_benchmarker = _unused
