"""Training steps compiled by XLA for NVIDIA GPUs, without a GPU, and their memory traffic.

XLA's own compiler runs whole through jax's CUDA plug-in and a description of the device; no device
and no driver is needed. The counts are facts of the compiled program, and say nothing of time.

- A kernel is an instruction of the scheduled program that is launched: a fusion or a copy.
- A pass is the reading or the writing of one tensor of the size of the activation, in its dtype.
  A training step takes at least 8: x twice and y forward, x and dy twice and dx backward.
"""

import math
import re
from typing import NamedTuple
from unittest import mock

import keras
import tensorflow as tf

# In a network the gradient depends on y. Without a fence between the two XLA would fuse them.
from tensorflow.compiler.tf2xla.python.xla import optimization_barrier

# A program with one node that calls a compiled function.
from tensorflow.core.framework import graph_pb2

# TensorFlow's graph optimizer, for a device that is described only.
from tensorflow.core.protobuf import config_pb2, device_properties_pb2
from tensorflow.python.framework import meta_graph
from tensorflow.python.grappler import cluster, tf_optimizer

import tfbn
from tfbn.layer import kernels

LAYERS = {"keras": keras.layers.BatchNormalization, "tfbn": tfbn.BatchNormalization}

# The numbers are the devices' public ones, in the form of XLA's `GpuTargetConfigProto`.
_DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {block}
  core_count: {cores}  fpus_per_core: {units}  clock_rate_ghz: {clock}
  memory_bandwidth: {bandwidth}  l2_cache_size: {cache}  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: 0 {feature} }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  device_address_bits: 64  pcie_bandwidth: 34359738368  ecc_enabled: true  name: "{name}"
  driver_version: "13.0.0"  runtime_version: "12.9.0"  compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""
_HOPPER = {
    "shared": 233472,
    "block": 232448,
    "cores": 132,
    "units": 128,
    "clock": 1.98,
    "cache": 52428800,
    "major": 9,
    "feature": "feature_extension: ACCELERATED_FEATURES",
}
_AMPERE = {
    "shared": 167936,
    "block": 166912,
    "cores": 108,
    "units": 64,
    "clock": 1.41,
    "cache": 41943040,
    "major": 8,
    "feature": "",
}
GPUS = {
    "H200": {**_HOPPER, "bandwidth": 4800 * 10**9, "memory": 151397597184},
    "H100": {**_HOPPER, "bandwidth": 3352 * 10**9, "memory": 84942979072},
    "A100": {**_AMPERE, "bandwidth": 2039 * 10**9, "memory": 85100068864},
}


class Kernel(NamedTuple):
    """A launch of a compiled program, and the bytes that it reads and writes."""

    name: str
    read: int
    written: int


def whole_step(layer, shape):
    """The HLO of forward, backward and moving update, as where XLA compiles the whole step."""
    layer.build((None, *shape[1:]))
    x = tf.zeros(shape, layer.compute_dtype)
    with as_on_gpu():
        return hlo_of(_training_step(layer, fenced=True), x, x)


def inference_step(layer, shape):
    """The HLO of an inference step."""
    layer.build((None, *shape[1:]))
    with as_on_gpu():
        return hlo_of(lambda x: layer(x, training=False), tf.zeros(shape, layer.compute_dtype))


def cluster_steps(layer, shape):
    """The HLO of each function that XLA compiles in a graph that is not compiled, by its name."""
    channels = shape[layer.axis]
    layer.build((None, *shape[1:]))
    spec = tf.TensorSpec(shape, layer.compute_dtype)
    with as_on_gpu():
        step = tf.function(_training_step(layer, fenced=False), autograph=False)
        graph = step.get_concrete_function(spec, spec).graph.as_graph_def()
    flat = {1: [channels], 2: [math.prod(shape) // channels, channels], 3: shape[:2]}
    flat[3] = [*shape[:2], math.prod(shape[2:])]
    steps = {}
    for function in graph.library.function:
        if function.attr["_XlaMustCompile"].b:
            program = graph_pb2.GraphDef(library=graph.library, versions=graph.versions)
            call = program.node.add(name="call", op="StatefulPartitionedCall")
            call.attr["f"].func.name = function.signature.name
            arguments = []
            for k, argument in enumerate(function.signature.input_arg):
                rank = len(function.arg_attr[k].attr["_output_shapes"].list.shape[0].dim)
                arguments.append(tf.zeros(flat[rank], argument.type))
                call.input.append(f"a{k}")
            call.attr["Tin"].list.type.extend(a.type for a in function.signature.input_arg)
            call.attr["Tout"].list.type.extend(a.type for a in function.signature.output_arg)
            results = [f"call:{k}" for k in range(len(function.signature.output_arg))]
            name = function.signature.name.split("_")[3]
            steps[name] = hlo_of(_imported(program, results), *arguments)
    return steps


def hlo_of(step, *arguments):
    """The serialized HLO module of a function."""
    function = tf.function(step, jit_compile=True, autograph=False)
    return function.experimental_get_compiler_ir(*arguments)("hlo_serialized")


def kernels_of(hlo, gpu):
    """The kernels that XLA compiles a serialized HLO module to."""
    return _kernels(*_computations(_compiled(hlo, gpu)))


def passes(kernels, shape, dtype):
    """How often the kernels read or write a tensor of that shape and dtype."""
    size = math.prod(shape) * tf.as_dtype(dtype).size
    return sum(kernel.read + kernel.written for kernel in kernels) / size


def operations_of(layer, shape):
    """What a training step does operation by operation in a graph that is not compiled."""
    layer.build((None, *shape[1:]))
    spec = tf.TensorSpec(shape, layer.compute_dtype)
    step = tf.function(_training_step(layer, fenced=False), autograph=False)
    return operations_in(step.get_concrete_function(spec, spec).graph)


def operations_in(graph):
    """The operations of a graph that move data, as kernels."""
    free = {"Reshape", "Identity", "IdentityN", "StopGradient", "Shape", "Placeholder", "NoOp"}
    return [
        Kernel(op.name, *(sum(map(_bytes_of_tensor, v)) for v in (op.inputs, op.outputs)))
        for op in graph.get_operations()
        if op.type not in {*free, "Const", "ReadVariableOp"}
    ]


def optimized_for_gpu(function):
    """The types of a concrete function's operations, as TensorFlow merges them for a GPU."""
    device = "/job:localhost/replica:0/task:0/device:GPU:0"
    meta = meta_graph.create_meta_graph_def(graph=function.graph)
    for node in meta.graph_def.node:
        node.device = device
    fetched = (tensor.op.name for tensor in function.outputs)
    meta.collection_def["train_op"].node_list.value.extend(fetched)
    properties = device_properties_pb2.DeviceProperties(type="GPU", vendor="NVIDIA")
    named = device_properties_pb2.NamedDevice(name=device, properties=properties)
    options = config_pb2.ConfigProto()
    options.graph_options.rewrite_options.optimizers.append("remap")
    options.graph_options.rewrite_options.min_graph_nodes = -1
    machine = cluster.Cluster(devices=[named])
    optimized = tf_optimizer.OptimizeGraph(options, meta, verbose=False, cluster=machine)
    return [node.op for node in optimized.node]


def as_on_gpu():
    return mock.patch.multiple(kernels, _gpu_visible=lambda: True, _xla_runs_on_gpu=lambda: True)


def _training_step(layer, *, fenced):
    def step(x, dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        result = y
        if fenced:
            result, dy = optimization_barrier(y, dy)
        return result, tape.gradient(y, [x, layer.gamma.value, layer.beta.value], dy)

    return step


def _imported(graph, results):
    def run(*arguments):
        feeds = {f"a{k}:0": value for k, value in enumerate(arguments)}
        return tf.graph_util.import_graph_def(graph, feeds, results)

    return run


def _compiled(hlo, gpu):
    import jax
    from jax._src.lib import xla_client
    from jax.experimental import topologies
    from portable_hlo import portable

    # Or the plug-in looks for a driver.
    jax.config.update("jax_platforms", "cpu")
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name=gpu,
        target_config=_DESCRIPTION.format(name=gpu, **GPUS[gpu]),
        topology="1x1x1",
    )
    device = topology.devices[0]
    # jax has no public way to compile HLO that it did not make.
    devices, options = xla_client.DeviceList((device,)), xla_client.CompileOptions()
    executable = device.client.compile(portable(hlo), devices, options)
    return executable.hlo_modules()[0].to_string()


_SIZES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2}
_FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element"}
_HEADER = re.compile(r"^(ENTRY )?%([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^  (?:ROOT )?%([\w.-]+) = (.+?) ([a-z][a-z-]*)\(([^)]*)\)(.*)$")


def _computations(text):
    """({computation: [(name, type, opcode, operands, attributes)]}, the name of the entry)."""
    computations, entry = {}, None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            body = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            body.append(instruction.groups())
        elif " = " in line and line.startswith("  "):
            raise ValueError(f"Cannot read an instruction of XLA's: {line}")
    return computations, entry


def _kernels(computations, computation):
    sizes, actual = {}, []
    for name, made, opcode, operands, attributes in computations[computation]:
        sizes[name] = _size(made)
        called = re.findall(r"(?:calls|to_apply|body)=%([\w.-]+)", attributes)
        if opcode == "fusion":
            reads = [
                _size_read(computations[called[0]], index, sizes[operand])
                for index, operand in enumerate(_names(operands))
            ]
            actual.append(Kernel(name, sum(reads), sizes[name]))
        elif opcode == "call":
            # A graph of launches.
            actual += _kernels(computations, called[0])
        elif opcode in ("while", "conditional"):
            raise ValueError(f"A step has a {opcode}, whose passes depend on the data.")
        elif opcode not in _FREE:
            actual.append(Kernel(name, sum(sizes[o] for o in _names(operands)), sizes[name]))
    return actual


def _size_read(body, index, size):
    """Bytes that a fusion reads of a parameter: only the slices, if it is only sliced."""
    (name, whole), *_ = ((n, m) for n, m, op, o, _ in body if op == "parameter" and o == str(index))
    names, elements = {name}, 0
    for name, made, opcode, operands, _ in body:
        if names.intersection(_names(operands)):
            if opcode in ("bitcast", "convert"):
                names.add(name)
            elif opcode == "slice":
                elements += math.prod(_shapes(made)[0][1])
            else:
                return size
    (dtype, _), *_ = _shapes(whole)
    return elements * _SIZES.get(dtype, 1)


def _names(operands):
    return re.findall(r"%([\w.-]+)", operands)


def _shapes(made):
    return [
        (dtype, [int(n) for n in sizes.split(",") if n])
        for dtype, sizes in re.findall(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]", made)
    ]


def _size(made):
    return sum(_SIZES.get(dtype, 1) * math.prod(sizes) for dtype, sizes in _shapes(made))


def _bytes_of_tensor(tensor):
    return tensor.dtype.size * (tensor.shape.num_elements() or 0)
