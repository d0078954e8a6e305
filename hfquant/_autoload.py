"""Makes `import hfquant` enough for transformers to know hfquant's checkpoints, without importing transformers.

transformers has no entry points for quantizers: the class must be registered by code that ran.  Importing
transformers here would do, and cost every `import hfquant` (the command line's `--help` among them) several
seconds.  So if transformers' registry is not loaded yet, a finder waits for it on `sys.meta_path`, steps aside
the moment it is asked for, and registers as soon as the registry has been executed.  No module is replaced, no
function patched.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"


class _Waiting(MetaPathFinder):
    """Finds nothing itself; notices that the registry is being imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    plugin = sys.modules.get(f"{__package__}.plugin")
    if plugin is not None and getattr(plugin.__spec__, "_initializing", False):
        return  # it was imported first, is what imports the registry, and registers itself when it is complete
    from .plugin import register

    register()


def install() -> None:
    """Register with transformers now if its registry is loaded, else as soon as it will be."""
    if REGISTRY in sys.modules:
        _register()
    elif not any(type(finder).__qualname__ == _Waiting.__qualname__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())
