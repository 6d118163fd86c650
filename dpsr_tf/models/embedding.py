"""Embedding tables that are read and trained where they lie: in the parameter server (DPSR section 5.1.3).

A worker sends the ids of its texts and gets one vector a text; it sends back one gradient a text. Rows and their
gradients, one a token, never travel.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.training.saving import saveable_object

from dpsr_tf import ops
from dpsr_tf.data.examples_dataset import Tokens

v1 = tf.compat.v1

COMBINERS = ("sum", "mean", "sqrtn")
IMPLEMENTATIONS = ("fused", "stock")
PLACEMENTS = ("whole", "rows")
# Where TensorFlow's AdagradOptimizer starts.
INITIAL_ACCUMULATOR = 0.1
# Steps from one update of the moving average of the weights to the next.
AVERAGE_STEPS = 10
# Graph collection of the variables of all tables.
TABLE_VARIABLES = "embedding_table_variables"
# Graph collection of pairs: a dense variable, and its value on the worker.
_HALF_ON_WIRE = "half_on_wire"


class EmbeddingTable:
    """A table of embeddings, float32 [num_ids, dim], with AdaGrad on the rows that a step has touched.

    Use: read it any number of times with `bag`, `bags` and `lookup`; then give the gradients of `outputs` to
    `apply_adagrad`. The function `minimize` does that together with the dense variables, in one backward pass:

        table = EmbeddingTable("token_embedding", vocabulary.num_ids, 64)
        query, item = table.bags([batch.query, batch.item])     # [b, 64], [n, 64]
        loss = ...
        train_op = minimize(loss, [table], learning_rate=0.01, global_step=v1.train.get_global_step())
        scaffold = v1.train.Scaffold(saver=saver([table]))

    in steps, say to clip the gradients:

        (of_table,), of_dense = gradients(loss, [table], dense_variables)
        train_op = tf.group(table.apply_adagrad(of_table, 0.01), optimizer.apply_gradients(zip(of_dense, ...)))

    Implementations, equal to rounding:
        fused: an op that sums rows, and one that applies AdaGrad from gradients of texts (dpsr_tf/ops/embedding.h).
            Every process of a cluster must have loaded the op library, ps too, which run no model_fn: call
            dpsr_tf.ops.load() there, or `device_function`, which does it.
        stock: TensorFlow's own ops, placed so that the same bytes travel. With it, turn grappler's
            `arithmetic_optimization` off: it makes copies of whole tables out of lookups. The fused one does not care.

    Where it lies: the table is a resource variable, placed as any variable by the device function in effect
    (`device_function` for a balanced one). "whole": in one piece. "rows": in `num_shards` pieces of consecutive ids
    (which of them frequent ids are in is as the ids are), each of which sends a vector a text: for tables that are too
    large for one ps. A checkpoint is the same for both, and for any number of shards: `<name>` and, from training,
    `<name>/Adagrad`, as AdagradOptimizer names it. So is the variable itself for warm start and export.

    Concurrent workers, with "fused": the AdaGrad step of a row, table and accumulator together, is atomic: no update is
    lost, and a read sees a row before or after it. With `saver`, a checkpoint holds each worker's update of a piece of
    the table in all its rows, in table and accumulator alike, or not at all, while training goes on. Between pieces,
    tables and dense variables nothing is promised, as ever in asynchronous training. With "stock", updates of the same
    row may be lost, as TensorFlow's are.

    Ids out of range are an InvalidArgumentError that names the id, and change nothing.

    Attributes:
        name, num_ids, dim: as given; `name` without the variable scope in effect.
        variables: the pieces of the table in order of ids, one for "whole".
        outputs: the sums that have been read so far, float32 [texts, dim] each; gradients are with respect to these.
    """

    def __init__(
        self,
        name: str,
        num_ids: int,
        dim: int,
        *,
        initializer: Callable[..., tf.Tensor] | None = None,
        placement: str = "whole",
        num_shards: int = 1,
        implementation: str = "fused",
        initial_accumulator: float = INITIAL_ACCUMULATOR,
        exclusive: bool = False,
    ):
        """Makes the variables, or takes those of this name where variable scopes allow it.

        Args:
            name: of the variable.
            num_ids: rows, at least 1.
            dim: width, at least 1.
            initializer: of the table; uniform within 1 / sqrt(dim) if left out.
            placement: "whole" or "rows".
            num_shards: pieces for "rows", usually the number of ps; more than num_ids count as num_ids.
            implementation: "fused" or "stock".
            initial_accumulator: where AdaGrad's sums of squared gradients start.
            exclusive: only one step at a time trains the table, as where there are no ps: "fused" then locks no rows.

        Raises:
            ValueError: a value that is not allowed.
        """
        _check("placement", placement, PLACEMENTS)
        _check("implementation", implementation, IMPLEMENTATIONS)
        if num_ids < 1 or dim < 1 or num_shards < 1:
            raise ValueError(f"num_ids {num_ids}, dim {dim}, num_shards {num_shards}: expected at least 1 each")
        if placement == "whole" and num_shards != 1:
            raise ValueError(f"num_shards is {num_shards}, expected 1 for placement 'whole'")
        self.name, self.num_ids, self.dim = name, num_ids, dim
        bound = dim**-0.5
        with v1.variable_scope(v1.get_variable_scope(), reuse=v1.AUTO_REUSE):
            variable = v1.get_variable(
                name,
                [num_ids, dim],
                initializer=initializer or v1.random_uniform_initializer(-bound, bound),
                partitioner=v1.fixed_size_partitioner(min(num_shards, num_ids)) if placement == "rows" else None,
                use_resource=True,
                collections=[v1.GraphKeys.GLOBAL_VARIABLES, TABLE_VARIABLES],
            )
        self.variables: list[tf.Variable] = [variable] if placement == "whole" else list(variable)
        self.outputs: list[tf.Tensor] = []
        self._kernels: _Fused | _Stock = (
            _Fused(self.variables, initial_accumulator, exclusive)
            if implementation == "fused"
            else _Stock(self.variables, initial_accumulator)
        )

    def bag(self, tokens: Tokens, weights: tf.Tensor | None = None, combiner: str = "sum") -> tf.Tensor:
        """One vector a text, float32 [texts, dim], zero for a text without tokens. Arguments as those of `bags`."""
        return self.bags([tokens], None if weights is None else [weights], combiner)[0]

    def bags(
        self, lists: Sequence[Tokens], weights: Sequence[tf.Tensor] | None = None, combiner: str = "sum"
    ) -> list[tf.Tensor]:
        """One vector a text of several lists of texts, which share one way to the ps and back.

        Args:
            lists: values int32 [tokens], row_splits int64 [texts + 1] each.
            weights: of the tokens, float32 [tokens] for each list; 1 if left out. They are not trained through.
            combiner: of the weighted rows: "sum"; "mean", over the sum of the weights; "sqrtn", over the root of the
                sum of their squares.

        Returns:
            float32 [texts, dim] for each list, zero for a text without tokens.
        """
        _check("combiner", combiner, COMBINERS)
        weights = None if weights is None else [tf.stop_gradient(weight) for weight in weights]
        output = self._kernels.sums(lists, weights)
        self.outputs.append(output)
        pooled = [output] if len(lists) == 1 else tf.split(output, [_num_texts(tokens) for tokens in lists])
        if combiner == "sum":
            return pooled
        by_list = weights or [None] * len(lists)
        return [
            tf.math.divide_no_nan(vectors, _norm(tokens, weight, combiner)[:, tf.newaxis])
            for vectors, tokens, weight in zip(pooled, lists, by_list, strict=True)
        ]

    def lookup(self, codes: tf.Tensor) -> tf.Tensor:
        """The rows of `codes`, int32 [n]: float32 [n, dim]."""
        return self.bag(Tokens(codes, tf.range(tf.size(codes, out_type=tf.int64) + 1)))

    def apply_adagrad(self, gradients: Sequence[tf.Tensor | None], learning_rate: float | tf.Tensor) -> tf.Operation:
        """One AdaGrad step on every row that has been read; to be called once a graph.

        The gradients of all occurrences of a row, in all reads, are summed before the step, as AdagradOptimizer does.

        Args:
            gradients: of `outputs`, float32 [texts, dim] each; None for an output that the loss does not depend on.
            learning_rate: number or float32 [].

        Raises:
            ValueError: not as many gradients as outputs.
        """
        if len(gradients) != len(self.outputs):
            raise ValueError(f"{len(gradients)} gradients, expected one for each of the {len(self.outputs)} outputs")
        with tf.name_scope(f"{self.name}_adagrad"):
            return self._kernels.apply(list(self.outputs), [_dense(gradient) for gradient in gradients], learning_rate)

    @property
    def snapshots(self) -> list[saveable_object.SaveableObject]:
        """What a Saver takes in place of `variables` and their accumulators; empty when there is nothing better."""
        return self._kernels.snapshots()


def minimize(
    loss: tf.Tensor,
    tables: Sequence[EmbeddingTable],
    learning_rate: float | tf.Tensor,
    global_step: tf.Variable | None = None,
    optimizer: tf.compat.v1.train.Optimizer | None = None,
) -> tf.Operation:
    """The training step: one backward pass over the tables' outputs and all other trainable variables.

    Args:
        loss: float32 [].
        tables: all tables that `loss` depends on.
        learning_rate: of the tables' AdaGrad, and of `optimizer` if it is left out.
        global_step: incremented by the step.
        optimizer: of the other variables; AdaGrad from INITIAL_ACCUMULATOR, all of a device in one op, if left out.
    """
    in_tables = {id(variable) for table in tables for variable in table.variables}
    dense = [variable for variable in v1.trainable_variables() if id(variable) not in in_tables]
    of_tables, of_dense = gradients(loss, tables, dense)
    if optimizer is None:
        steps = _adagrad(dense, of_dense, learning_rate)
    else:
        steps = [optimizer.apply_gradients(zip(of_dense, dense, strict=True))] if dense else []
    if global_step is not None:
        steps.append(global_step.assign_add(1, read_value=False))
    for table, of_table in zip(tables, of_tables, strict=True):
        steps.append(table.apply_adagrad(of_table, learning_rate))
    return tf.group(*steps)


def _adagrad(
    variables: Sequence[tf.Variable],
    gradients: Sequence[tf.Tensor | None],
    learning_rate: float | tf.Tensor,
) -> list[tf.Operation]:
    """A step on dense variables, those of a device in one op."""
    used = [pair for pair in zip(variables, map(_dense, gradients), strict=True) if pair[1] is not None]
    by_device: dict[str, list[tuple[tf.Variable, tf.Variable, tf.Tensor]]] = {}
    accumulators = _accumulators([variable for variable, _ in used], INITIAL_ACCUMULATOR)
    for (variable, gradient), accumulator in zip(used, accumulators, strict=True):
        by_device.setdefault(variable.device, []).append((variable.handle, accumulator.handle, gradient))
    steps = []
    for device, found in by_device.items():
        with tf.device(device):
            steps.append(ops.load().dpsr_dense_adagrad(*map(list, zip(*found, strict=True)), learning_rate))
    return steps


def _accumulators(variables: Sequence[tf.Variable], initial: float) -> list[tf.Variable]:
    """Made by TensorFlow's optimizer, so that their names, places and slices are its own."""
    optimizer = v1.train.AdagradOptimizer(1.0, initial)
    optimizer._create_slots(variables)
    return [optimizer.get_slot(variable, "accumulator") for variable in variables]


def gradients(
    loss: tf.Tensor, tables: Sequence[EmbeddingTable], variables: Sequence[tf.Variable]
) -> tuple[list[list[tf.Tensor | None]], list[tf.Tensor | None]]:
    """What `minimize` applies, for those who clip or watch it: of every table's outputs, and of dense variables.

    None where the loss does not depend on it. The gradients of variables under `half_on_wire` are taken to the ps.
    """
    outputs = [output for table in tables for output in table.outputs]
    on_worker = {id(variable): value for variable, value in v1.get_collection(_HALF_ON_WIRE)}
    found = tf.gradients(loss, outputs + [on_worker.get(id(variable), variable) for variable in variables])
    of_tables = []
    begin = 0
    for table in tables:
        of_tables.append(found[begin : begin + len(table.outputs)])
        begin += len(table.outputs)
    of_variables = [
        _to_ps(gradient, variable) if gradient is not None and id(variable) in on_worker else gradient
        for gradient, variable in zip(found[begin:], variables, strict=True)
    ]
    return of_tables, of_variables


def average(train_op: tf.Operation, decay: float, global_step: tf.Variable) -> tf.Operation:
    """Keeps a moving average of all trainable variables beside them (Polyak and Juditsky, 1992).

    Args:
        train_op: the training step.
        decay: what a step leaves of the average; 0.998 averages over some 500 steps. At first, when that would be more
            than there are, the average is over about as many steps as were made.
        global_step: incremented by train_op.

    Returns:
        The training step with the average, which costs one pass over all variables every AVERAGE_STEPS steps.
    """
    with tf.control_dependencies([train_op]):
        step = global_step.read_value()
    averages = tf.train.ExponentialMovingAverage(decay**AVERAGE_STEPS, step // AVERAGE_STEPS)
    averages.apply(v1.trainable_variables())  # makes the averages, outside of the branch below
    return tf.cond(tf.equal(step % AVERAGE_STEPS, 0), lambda: averages.apply(v1.trainable_variables()), tf.no_op)


def weights_saver(is_average: bool) -> tf.compat.v1.train.Saver:
    """A Saver that restores the weights of a checkpoint into a graph of the towers: `average`'s where that ran."""
    if not is_average:
        return v1.train.Saver()
    averages = tf.train.ExponentialMovingAverage(0.5)
    return v1.train.Saver({averages.average_name(variable): variable for variable in v1.global_variables()})


def saver(tables: Sequence[EmbeddingTable], **arguments: Any) -> tf.compat.v1.train.Saver:
    """A Saver of all variables of the graph that keeps each table and its accumulator consistent.

    To be called when the training graph is complete, and given to v1.train.Scaffold. The checkpoints are those of any
    Saver. While it saves, it needs room for a second table and accumulator, as any does.

    Args:
        tables: those of the graph.
        arguments: of v1.train.Saver, over those that Estimator takes: sharded, save_relative_paths.
    """
    snapshots = [snapshot for table in tables for snapshot in table.snapshots]
    taken = {id(variable) for snapshot in snapshots for variable in snapshot.pair}
    others = v1.global_variables() + v1.get_collection(v1.GraphKeys.SAVEABLE_OBJECTS)
    values = [value for value in others if id(value) not in taken]
    return v1.train.Saver(snapshots + values, **{"sharded": True, "save_relative_paths": True, **arguments})


class GreedyBySize:
    """Gives every variable to the ps that has the fewest bytes yet: a `ps_strategy` of v1.train.replica_device_setter.

    Counts anew in every graph, so that all processes of a cluster, and a restarted one, place alike. Make the largest
    tables first for the best balance.
    """

    def __init__(self, num_ps: int):
        """`num_ps`: parameter servers of the cluster."""
        self._num_ps = num_ps
        self._bytes: weakref.WeakKeyDictionary[tf.Graph, list[int]] = weakref.WeakKeyDictionary()

    def __call__(self, op: tf.Operation) -> int:
        """The task of the ps for a variable's op."""
        loads = self._bytes.setdefault(op.graph, [0] * self._num_ps)
        task = loads.index(min(loads))
        if op.type == "VarHandleOp":
            shape = tf.TensorShape(op.get_attr("shape"))
            loads[task] += (shape.num_elements() or 0) * tf.as_dtype(op.get_attr("dtype")).size
        return task


def device_function(run_config: tf.estimator.RunConfig) -> Callable[[tf.Operation], str] | None:
    """For RunConfig(device_fn=...): Estimator's own placement, but whole tables are spread over ps by size.

    None without ps, which is what `device_fn` takes then. Loads the op library, so that a ps has it.
    """
    ops.load()
    if not run_config.num_ps_replicas:
        return None
    return v1.train.replica_device_setter(
        cluster=run_config.cluster_spec,
        worker_device=f"/job:{run_config.task_type}/task:{run_config.task_id}",
        ps_strategy=GreedyBySize(run_config.num_ps_replicas),
    )


def half_on_wire(getter: Callable[..., tf.Variable], name: str, *args: Any, **kwargs: Any) -> tf.Variable | tf.Tensor:
    """A custom getter that halves what the dense weights of the towers cost between ps and worker.

        with v1.variable_scope(v1.get_variable_scope(), custom_getter=half_on_wire):
            ...  # build the towers

    The ps keeps weights and accumulators in float32 and applies float32 AdaGrad. What travels is the weight as float16
    (small numbers, 11 significant bits) and its gradient as bfloat16 (any size, 8 significant bits), once a step each
    however often the graph reads the weight. Variables that do not lie on a ps, and tables, are left as they are.

    Take the gradients by `minimize` or `gradients`. A term of the loss that reads the variable itself, not what
    get_variable returned, has no part in them.
    """
    variable = getter(name, *args, **kwargs)
    is_table = TABLE_VARIABLES in (kwargs.get("collections") or [])
    if is_table or variable.dtype != tf.float32 or tf.DeviceSpec.from_string(variable.device).job != "ps":
        return variable
    reads = v1.get_collection_ref(_HALF_ON_WIRE)
    for read, value in reads:
        if read is variable:
            return value
    with tf.device(variable.device):
        half = tf.cast(variable, tf.float16)
    reads.append((variable, tf.cast(half, tf.float32)))
    return reads[-1][1]


def _to_ps(gradient: tf.Tensor, variable: tf.Variable) -> tf.Tensor:
    half = tf.cast(gradient, tf.bfloat16)
    with tf.device(variable.device):
        return tf.cast(half, tf.float32)


class _Fused:
    """Our ops; one packed array of ids a shard and call."""

    def __init__(self, variables: list[tf.Variable], initial_accumulator: float, exclusive: bool):
        self._ops = ops.load()
        self._variables, self._initial_accumulator, self._exclusive = variables, initial_accumulator, exclusive
        self._first_rows = [0]
        for variable in variables:
            self._first_rows.append(self._first_rows[-1] + int(variable.shape[0]))
        self._packed: list[list[tf.Tensor]] = []  # of each output, of each shard
        self._accumulators: list[tf.Variable] = []

    def sums(self, lists: Sequence[Tokens], weights: Sequence[tf.Tensor] | None) -> tf.Tensor:
        packed = self._ops.dpsr_pack_tokens(
            values=[tokens.values for tokens in lists],
            row_splits=[tokens.row_splits for tokens in lists],
            weights=weights or [],
            num_shards=len(self._variables),
            first_rows=self._first_rows,
        )
        self._packed.append(packed)
        sums = []
        for variable, ids in zip(self._variables, packed, strict=True):
            with tf.device(variable.device):
                sums.append(
                    self._ops.dpsr_embedding_bag(
                        variable.handle, ids, dim=int(variable.shape[1]), exclusive=self._exclusive
                    )
                )
        return sums[0] if len(sums) == 1 else tf.add_n(sums)

    def apply(
        self, outputs: list[tf.Tensor], gradients: list[tf.Tensor | None], learning_rate: float | tf.Tensor
    ) -> tf.Operation:
        self._accumulators = _accumulators(self._variables, self._initial_accumulator)
        used = [i for i, gradient in enumerate(gradients) if gradient is not None]
        if not used:
            return tf.no_op()
        steps = []
        for shard, (variable, accumulator) in enumerate(zip(self._variables, self._accumulators, strict=True)):
            with tf.device(variable.device):
                steps.append(
                    self._ops.dpsr_embedding_adagrad(
                        variable.handle,
                        accumulator.handle,
                        learning_rate,
                        [self._packed[i][shard] for i in used],
                        [gradients[i] for i in used],
                        exclusive=self._exclusive,
                    )
                )
        return tf.group(*steps)

    def snapshots(self) -> list[saveable_object.SaveableObject]:
        return [_Snapshot(*pair) for pair in zip(self._variables, self._accumulators, strict=False)]


class _Stock:
    """TensorFlow's ops on the tables' devices, gradients too."""

    def __init__(self, variables: list[tf.Variable], initial_accumulator: float):
        self._variables, self._initial_accumulator = variables, initial_accumulator

    def sums(self, lists: Sequence[Tokens], weights: Sequence[tf.Tensor] | None) -> tf.Tensor:
        values = tf.concat([tokens.values for tokens in lists], 0)
        lengths = tf.concat([tokens.row_splits[1:] - tokens.row_splits[:-1] for tokens in lists], 0)
        row_splits = tf.concat([[0], tf.cumsum(lengths)], 0)
        weight = None if weights is None else tf.concat(weights, 0)
        if len(self._variables) == 1:
            return self._sum(self._variables[0], values, row_splits, weight)
        # The shard of each id, then for each shard its ids and how many of them each text has.
        last_rows = tf.cumsum([int(variable.shape[0]) for variable in self._variables])[:-1]
        shards = tf.searchsorted(last_rows, values, side="right")
        segments = tf.ragged.row_splits_to_segment_ids(row_splits)
        sums = []
        first_row = 0
        for i, variable in enumerate(self._variables):
            own = tf.where(tf.equal(shards, i))[:, 0]
            in_text = tf.math.unsorted_segment_sum(
                tf.ones_like(own), tf.gather(segments, own), tf.size(lengths, out_type=tf.int64)
            )
            sums.append(
                self._sum(
                    variable,
                    tf.gather(values, own) - first_row,
                    tf.concat([[0], tf.cumsum(in_text)], 0),
                    None if weight is None else tf.gather(weight, own),
                )
            )
            first_row += int(variable.shape[0])
        return tf.add_n(sums)

    def _sum(
        self, variable: tf.Variable, values: tf.Tensor, row_splits: tf.Tensor, weights: tf.Tensor | None
    ) -> tf.Tensor:
        with tf.device(variable.device):
            rows = tf.gather(variable, values)
            if weights is not None:
                rows *= weights[:, tf.newaxis]
            segments = tf.ragged.row_splits_to_segment_ids(row_splits)
            sums = tf.math.unsorted_segment_sum(rows, segments, tf.size(row_splits) - 1)
            return tf.ensure_shape(sums, [None, variable.shape[1]])

    def apply(
        self, outputs: list[tf.Tensor], gradients: list[tf.Tensor | None], learning_rate: float | tf.Tensor
    ) -> tf.Operation:
        pairs = [pair for pair in zip(outputs, gradients, strict=True) if pair[1] is not None]
        rows = v1.gradients(
            [output for output, _ in pairs],
            self._variables,
            [gradient for _, gradient in pairs],
            colocate_gradients_with_ops=True,
        )
        optimizer = v1.train.AdagradOptimizer(learning_rate, self._initial_accumulator)
        return optimizer.apply_gradients(zip(rows, self._variables, strict=True))

    def snapshots(self) -> list[saveable_object.SaveableObject]:
        return []


class _Snapshot(saveable_object.SaveableObject):
    """Table and accumulator read by one op, under the locks of both."""

    def __init__(self, variable: tf.Variable, accumulator: tf.Variable):
        self.pair = (variable, accumulator)
        with tf.device(variable.device):
            copies = ops.load().dpsr_embedding_snapshot(variable.handle, accumulator.handle)
        specs = []
        for each, copy in zip(self.pair, copies, strict=True):
            part = each._save_slice_info
            name, slice_spec = (part.full_name, part.spec) if part else (each.op.name, "")
            specs.append(saveable_object.SaveSpec(copy, slice_spec, name, each.dtype, each.device))
        super().__init__(variable.handle, specs, variable.op.name)

    def restore(self, restored_tensors: Sequence[tf.Tensor], restored_shapes: Any) -> tf.Operation:
        """Assigns both; InvalidArgumentError where the checkpoint has another shape."""
        assigned = []
        for variable, value in zip(self.pair, restored_tensors, strict=True):
            with tf.device(variable.device):
                assigned.append(variable.assign(tf.ensure_shape(value, variable.shape), read_value=False))
        return tf.group(*assigned)


@tf.RegisterGradient("DpsrEmbeddingBag")
def _no_gradient(op: tf.Operation, gradient: tf.Tensor) -> None:
    raise LookupError(
        f"{op.name}: an embedding table has no gradient with respect to its variable; take that of "
        "EmbeddingTable.outputs and give it to apply_adagrad, or use dpsr_tf.models.embedding.minimize"
    )


def _check(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{what} is {value!r}, expected one of {', '.join(map(repr, allowed))}")


def _dense(gradient: tf.Tensor | tf.IndexedSlices | None) -> tf.Tensor | None:
    # A gather from the pooled vectors has a sparse gradient.
    return tf.convert_to_tensor(gradient) if isinstance(gradient, tf.IndexedSlices) else gradient


def _num_texts(tokens: Tokens) -> tf.Tensor:
    return tf.size(tokens.row_splits) - 1


def _norm(tokens: Tokens, weights: tf.Tensor | None, combiner: str) -> tf.Tensor:
    """What the sum of each text is divided by, float32 [texts]."""
    if weights is None:
        total = tf.cast(tokens.row_splits[1:] - tokens.row_splits[:-1], tf.float32)
    else:
        total = tf.math.unsorted_segment_sum(
            weights if combiner == "mean" else tf.square(weights),
            tf.ragged.row_splits_to_segment_ids(tokens.row_splits),
            _num_texts(tokens),
        )
    return total if combiner == "mean" else tf.sqrt(total)
