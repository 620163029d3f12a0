"""The backend's compiler, which compiles nothing."""

from typing import Any

from triton.backends.compiler import BaseBackend


class InterpretedBackend(BaseBackend):
    """Supports no target."""

    @staticmethod
    def supports_target(target: Any) -> bool:
        return False

    def _unused(self, *args: Any) -> Any:
        raise NotImplementedError("kernels are interpreted")

    hash = parse_options = add_stages = load_dialects = get_module_map = _unused
