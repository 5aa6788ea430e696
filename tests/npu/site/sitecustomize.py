"""Run by every Python process of the npu tests: as soon as one imports torch_npu, its operators run on the stub's devices
(tests/npu/dispatch.py). Product code knows nothing of it."""

import importlib.abc
import importlib.machinery
import sys


class Loader(importlib.abc.Loader):
    def __init__(self, real):
        self.real = real

    def create_module(self, spec):
        return self.real.create_module(spec)

    def exec_module(self, module):
        self.real.exec_module(module)
        from tests.npu import dispatch

        dispatch.install()


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "torch_npu":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None:
            spec.loader = Loader(spec.loader)
        return spec


sys.meta_path.insert(0, Finder())
