"""The inference graph of an observed model, run whole or level by level.

A call of a batch norm layer has level 1 if no other observed call lies on a path to it,
and else one more than the highest level on such a path. Calls of one level can be
observed together once all lower levels have settled on their population statistics.
"""

import tensorflow as tf


class Trace:
    """One trace of an observed model, for batches of one signature.

    Args:
        observation: The `tfbn.sweep.observe.Observation` of the model.
        structure: A structure of `tf.TypeSpec`, as the model takes it.
        specs: The specs of its dense tensors, which may leave dimensions open.
        settled: Whether every site normalises with the population that it is given when
            the graph is run, or else with the moments of the batch, as in training.

    Attributes:
        sites: The sites that were met, in the order of their calls.
        vectorized: Whether a call is in a function that `tf.vectorized_map` vectorizes. Such
            a function is traced for one of its elements, and only that one would be seen.
        levels: The highest level of a call, or `None` if the graph cannot be run level by
            level, because a layer is called in the body of a loop or branch.
    """

    def __init__(self, observation, structure, specs, *, settled):
        self.specs = specs
        self._calls = []
        self._populations = {}

        def run(*flat):
            graph = tf.compat.v1.get_default_graph()

            def population(site, channels):
                if site not in self._populations:
                    with graph.as_default():  # Not in the body of a loop that the site may be in.
                        held = tf.compat.v1.placeholder(tf.float64, [2, channels])
                    self._populations[site] = held
                return self._populations[site]

            inputs = tf.nest.pack_sequence_as(structure, flat, expand_composites=True)
            outputs = observation.run(
                inputs, population=population if settled else None, met=self._calls
            )
            return tf.nest.flatten(outputs, expand_composites=True)

        # `tf.function` runs every operation that has a side effect. A wrapped function can
        # be pruned to what is asked for, which leaves the rest of the model without effect.
        self._function = tf.compat.v1.wrap_function(run, specs)
        self._frontiers = {0: self._function.inputs[: len(specs)]}
        self._parts = {}
        self.vectorized = self._depends_on_default()
        self.levels = None
        if all(call.fetches is not None for call in self._calls):
            self._find_levels()

    @property
    def sites(self):
        return list(dict.fromkeys(call.site for call in self._calls))

    def run(self, inputs, populations):
        """Run the network once.

        Args:
            inputs: A batch.
            populations: For every site that has one its mean and variance, a tensor of
                shape (2, channels).

        Returns:
            What entered: for every call its site and a list of (count, mean, variance).
        """
        if None not in self._parts:
            fetches = [] if self.levels is not None else [self._function.outputs]
            self._parts[None] = self._cut(0, self._calls, fetches, list(self._populations))
        return self._parts[None](inputs, populations)[0]

    def part(self, level, start, values, populations, keep):
        """Run the network from the frontier of level `start` up to the calls of `level`.

        The frontier of a level are the tensors that later levels need of what has been
        computed for this level and those before it. The frontier of level 0 are the
        model's inputs.

        Args:
            level: The level of the calls to observe.
            start: An earlier level.
            values: The tensors at the frontier of `start`.
            populations: See `run`; those of the sites below `level` matter.
            keep: Whether to compute the frontier of `level` too.

        Returns:
            For every call of the level its site and what entered, as `run` has it; and the
            tensors at the frontier of `level`, or none if they are not to be kept.
        """
        key = (level, start, keep)
        if key not in self._parts:
            below = [call.site for number in range(1, level) for call in self._at(number)]
            wanted = self._frontiers[level] if keep else []
            self._parts[key] = self._cut(start, self._at(level), wanted, below)
        return self._parts[key](values, populations)

    def can_keep(self, level):
        """Whether the tensors at the frontier of a level can be kept outside the graph."""
        kept = self._frontiers[level]
        return all(tensor.dtype not in (tf.variant, tf.resource) for tensor in kept)

    def _cut(self, start, calls, wanted, sites):
        """The function from a frontier to what enters some calls, and to some tensors.

        The populations that sites normalise with are fed to it too.
        """
        sites = list(dict.fromkeys(sites))
        feeds = self._frontiers[start] + [self._populations[site] for site in sites]
        # Without a signature every call would first try one that does not fit, which takes
        # longer than the call.
        signature = tuple(tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in feeds), {}
        fetches = [call.fetches or [] for call in calls]
        function = self._function.prune(feeds, [fetches, wanted], input_signature=signature)

        def run(values, populations):
            values = tf.nest.flatten(values, expand_composites=True)
            fetched, kept = function(*values, *(populations[site] for site in sites))
            found = [
                (call.site, call.measure(*values))
                for call, values in zip(calls, fetched, strict=True)
            ]
            return found, kept

        return run

    def _at(self, level):
        return [call for call in self._calls if self._level[id(call.outputs)] == level]

    def _depends_on_default(self):
        # The number of the element is a placeholder whose default is that of the first.
        found = set()
        for op in self._function.graph.get_operations():  # Inputs come before their users.
            if op.type == "PlaceholderWithDefault" or any(id(s) in found for s in _sources(op)):
                found.add(id(op))
        return any(id(tensor.op) in found for call in self._calls for tensor in call.inputs)

    def _find_levels(self):
        graph_ops = self._function.graph.get_operations()  # Inputs come before their users.
        call_of = {id(call.outputs.op): call for call in self._calls}
        self._level = {}
        depth = {}  # How many levels must have settled for an operation's outputs to be right.
        from_data = {id(tensor.op) for tensor in self._frontiers[0]}
        users = {}
        for op in graph_ops:
            sources = _sources(op)
            depth[id(op)] = max((depth[id(source)] for source in sources), default=0)
            if any(id(source) in from_data for source in sources):
                from_data.add(id(op))
            for tensor in op.inputs:
                users.setdefault(id(tensor), []).append(op)
            if id(op) in call_of:
                call = call_of[id(op)]
                level = 1 + max(depth[id(tensor.op)] for tensor in call.inputs)
                self._level[id(call.outputs)] = depth[id(op)] = level
        self.levels = max(self._level.values(), default=0)

        # The first level that needs an operation; the inputs are there before any.
        needed = {id(tensor.op): 0 for tensor in self._frontiers[0]}
        for level in range(1, self.levels + 1):
            pending = [tensor.op for call in self._at(level) for tensor in call.fetches]
            while pending:
                op = pending.pop()
                if id(op) not in needed:
                    needed[id(op)] = level
                    pending += _sources(op)
        for level in range(1, self.levels + 1):
            # Weights and what follows from them alone are cheaper to read again than to keep.
            self._frontiers[level] = [
                tensor
                for op in graph_ops
                if id(op) in from_data and needed.get(id(op), self.levels + 1) <= level
                for tensor in op.outputs
                if any(needed.get(id(user), 0) > level for user in users.get(id(tensor), ()))
            ]


def _sources(op):
    return [tensor.op for tensor in op.inputs] + list(op.control_inputs)
