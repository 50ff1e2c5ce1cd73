"""In place of SGLang's kernels, of which there is no build for CPUs: none may be called.

SGLang imports some by name on a CPU, and uses them only where the processor has AMX and the
operators are registered.
"""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_, **__):
        raise NotImplementedError(f"sgl_kernel.{name} in the tests' environment")

    return missing
