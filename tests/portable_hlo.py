"""HLO that TensorFlow made, as jax's plug-ins take it. Needs jax alone."""

from jax._src.interpreters import mlir
from jax._src.lib import xla_client
from jaxlib.mlir import ir


def portable(hlo):
    """Convert a serialized HLO module to StableHLO, where copies have no portable form."""
    with mlir.make_ir_context():
        module = ir.Module.parse(xla_client._xla.mlir.hlo_to_stablehlo(hlo))
        main = module.body.operations[len(module.body.operations) - 1]
        for operation in list(main.regions[0].blocks[0].operations):
            if operation.operation.name == "mhlo.copy":
                operation.results[0].replace_all_uses_with(operation.operands[0])
                operation.operation.erase()
    return module
