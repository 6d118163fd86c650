"""Embedding tables that are read and trained where they are stored, on the parameter server (DPSR section 5.1.3).

A worker sends the ids of its texts and receives one vector for each text. It sends back one gradient for each text. The
rows and their gradients, of which there is one for each token, never travel.
"""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

import tensorflow as tf
from tensorflow.python.training.saving import saveable_object

from dpsr_tf import ops
from dpsr_tf.data.examples_dataset import Tokens

v1 = tf.compat.v1

COMBINERS = ("sum", "mean", "sqrtn")
IMPLEMENTATIONS = ("fused", "stock")
PLACEMENTS = ("whole", "rows")
# Start value of the accumulators, as in TensorFlow's AdagradOptimizer.
INITIAL_ACCUMULATOR = 0.1
# Number of steps from one update of the moving average of the weights to the next.
AVERAGE_STEPS = 10
# Graph collection of the variables of all tables.
TABLE_VARIABLES = "embedding_table_variables"
# Graph collection of the pieces of tables that are placed by rows.
_PIECES = "embedding_table_pieces"
# Graph collection of pairs: a dense variable, and its value on the worker.
_HALF_ON_WIRE = "half_on_wire"


class EmbeddingTable:
    """A table of embeddings, float32 [num_ids, dim], that AdaGrad trains on the rows that a step has read.

    Read it any number of times with `bag`, `bags` and `lookup`, then give the gradients of `outputs` to
    `apply_adagrad`. The function `minimize` does that together with the dense variables, in one backward pass:

        table = EmbeddingTable("token_embedding", vocabulary.num_ids, 64)
        query, item = table.bags([batch.query, batch.item])     # [b, 64], [n, 64]
        loss = ...
        train_op = minimize(loss, [table], learning_rate=0.01, global_step=v1.train.get_global_step())
        scaffold = v1.train.Scaffold(saver=saver([table]))

    To clip the gradients, for example, do it step by step:

        (table_gradients,), dense_gradients = gradients(loss, [table], dense_variables)
        train_op = tf.group(
            table.apply_adagrad(table_gradients, 0.01), optimizer.apply_gradients(zip(dense_gradients, ...))
        )

    There are two implementations, which agree up to rounding:
        fused: one op sums rows, another applies AdaGrad from the gradients of texts (dpsr_tf/ops/embedding.h). Every
            process of a cluster must load the op library. A ps runs no model_fn, so call dpsr_tf.ops.load() there, or
            `device_function`, which does it.
        stock: TensorFlow's own ops, placed so that the same bytes travel. Turn grappler's `arithmetic_optimization` off
            with this one, because it turns lookups into copies of whole tables. The fused one is not affected.

    Placement: the table is a resource variable, which the device function in effect places like any other variable
    (`device_function` balances the load). "whole" keeps it in one piece. "rows" splits it into `num_shards` pieces,
    each of which sends one vector for each text; it is for tables that are too large for one ps. Each piece gets as
    many rows as the others, and as many look-ups (`spread_rows`). A checkpoint is the same for both, and for any number
    of shards: it has `<name>` and, from training, `<name>/Adagrad`, as AdagradOptimizer names it, with the rows in the
    order of ids. It takes a Saver that `saver` made. Warm start and export see the same variable too.

    Concurrent workers: with "fused", the AdaGrad step of a row is atomic, table and accumulator together. No update is
    lost, and a read sees the row before or after the step. With `saver`, a checkpoint that is written during training
    holds a worker's update of a piece of the table in all its rows, table and accumulator, or in none. Between pieces,
    tables and dense variables there is no such promise, as always in asynchronous training. With "stock", updates of
    the same row may be lost, as with TensorFlow's own ops.

    An id out of range raises InvalidArgumentError, which names the id, and changes nothing.

    Attributes:
        name, num_ids, dim: as given; `name` without the variable scope in effect.
        variables: the pieces of the table; one piece for "whole". `rows_of` says which ids they have.
        outputs: the sums that were read so far, float32 [texts, dim] each. Gradients are taken with respect to these.
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
        begins: Sequence[int] = (0,),
        implementation: str = "fused",
        initial_accumulator: float = INITIAL_ACCUMULATOR,
        accumulator_decay: float = 1.0,
        exclusive: bool = False,
    ):
        """Makes the variables, or reuses the ones of this name where variable scopes allow it.

        Args:
            name: name of the variable.
            num_ids: number of rows, at least 1.
            dim: width, at least 1.
            initializer: initializer of the table; by default uniform within +-1 / sqrt(dim). For "rows" it is called
                for each range of ids, and gets its first id as `partition_info.var_offset[0]`.
            placement: "whole" or "rows".
            num_shards: number of pieces for "rows", usually the number of ps; num_ids if it is larger than that.
            begins: for "rows", the first ids of the parts of the table, ascending from 0. Within a part, ids go by
                frequency, the most frequent first, as those of a vocabulary or of the values of a feature do.
            implementation: "fused" or "stock".
            initial_accumulator: start value of AdaGrad's sums of squared gradients.
            accumulator_decay: share of a row's sum that a step keeps, above 0 and at most 1. Below 1, the sum is a
                moving average of squared gradients (RMSProp, on the rows that are read); "fused" only.
            exclusive: whether only one step at a time trains the table, as without ps. "fused" then locks no rows.

        Raises:
            ValueError: a value is not allowed.
        """
        _check("placement", placement, PLACEMENTS)
        _check("implementation", implementation, IMPLEMENTATIONS)
        if num_ids < 1 or dim < 1 or num_shards < 1:
            raise ValueError(f"num_ids {num_ids}, dim {dim}, num_shards {num_shards}: expected at least 1 each")
        if accumulator_decay != 1 and implementation != "fused":
            raise ValueError(f"accumulator_decay is {accumulator_decay}, expected 1 for implementation 'stock'")
        if placement == "whole" and num_shards != 1:
            raise ValueError(f"num_shards is {num_shards}, expected 1 for placement 'whole'")
        self.name, self.num_ids, self.dim = name, num_ids, dim
        num_shards = min(num_shards, num_ids)
        self._ranges = spread_rows(num_ids, num_shards, begins)
        self.variables: list[tf.Variable] = []
        with v1.variable_scope(v1.get_variable_scope(), reuse=v1.AUTO_REUSE):
            for shard in range(num_shards):
                rows = self._ranges.of_shard(shard)
                variable = v1.get_variable(
                    name if num_shards == 1 else f"{name}/part_{shard}",
                    [sum(end - begin for begin, end in rows), dim],
                    initializer=_initializer(initializer, num_ids, dim, rows),
                    use_resource=True,
                    collections=[v1.GraphKeys.GLOBAL_VARIABLES, TABLE_VARIABLES],
                )
                self.variables.append(variable)
                if num_shards > 1:
                    v1.add_to_collection(_PIECES, _Piece(variable.op.name, num_ids, rows))
        self.outputs: list[tf.Tensor] = []
        self._kernels: _Fused | _Stock = (
            _Fused(self.variables, self._ranges, initial_accumulator, accumulator_decay, exclusive)
            if implementation == "fused"
            else _Stock(self.variables, self._ranges, initial_accumulator)
        )

    def bag(self, tokens: Tokens, weights: tf.Tensor | None = None, combiner: str = "sum") -> tf.Tensor:
        """Returns one vector for each text, float32 [texts, dim]; see `bags`."""
        return self.bags([tokens], None if weights is None else [weights], combiner)[0]

    def bags(
        self, lists: Sequence[Tokens], weights: Sequence[tf.Tensor] | None = None, combiner: str = "sum"
    ) -> list[tf.Tensor]:
        """Returns one vector for each text of several lists of texts, with a single request to each ps.

        Args:
            lists: values int32 [tokens], row_splits int64 [texts + 1] each.
            weights: weights of the tokens, float32 [tokens] for each list; 1 by default. They get no gradient.
            combiner: how the weighted rows are combined: "sum"; "mean", the sum divided by the sum of the weights;
                "sqrtn", the sum divided by the square root of the sum of the squared weights.

        Returns:
            float32 [texts, dim] for each list; zero for a text without tokens.
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
        """Returns the rows of `codes`, int32 [n]: float32 [n, dim]."""
        rows = self._kernels.rows(codes)
        if rows is None:
            return self.bag(Tokens(codes, tf.range(tf.size(codes, out_type=tf.int64) + 1)))
        self.outputs.append(rows)
        return rows

    def apply_adagrad(self, gradients: Sequence[tf.Tensor | None], learning_rate: float | tf.Tensor) -> tf.Operation:
        """Applies one AdaGrad step to every row that was read. Call it once in a graph.

        Like AdagradOptimizer, it sums the gradients of all occurrences of a row, in all reads, before the step.

        Args:
            gradients: gradients of `outputs`, float32 [texts, dim] each; None for an output that the loss does not use.
            learning_rate: number or float32 [].

        Raises:
            ValueError: the number of gradients is not the number of outputs.
        """
        if len(gradients) != len(self.outputs):
            raise ValueError(f"{len(gradients)} gradients, expected one for each of the {len(self.outputs)} outputs")
        with tf.name_scope(f"{self.name}_adagrad"):
            return self._kernels.apply(list(self.outputs), [_dense(gradient) for gradient in gradients], learning_rate)

    @property
    def snapshots(self) -> list[saveable_object.SaveableObject]:
        """What a Saver must save in place of `variables` and accumulators; empty if it can save these directly."""
        return self._kernels.snapshots()


def minimize(
    loss: tf.Tensor,
    tables: Sequence[EmbeddingTable],
    learning_rate: float | tf.Tensor,
    global_step: tf.Variable | None = None,
    optimizer: tf.compat.v1.train.Optimizer | None = None,
    dense_learning_rate: float | tf.Tensor | None = None,
    is_trained: Callable[[str], bool] = lambda name: True,
) -> tf.Operation:
    """Returns the training step: one backward pass over the tables' outputs and all other trainable variables.

    Args:
        loss: float32 [].
        tables: all tables that `loss` depends on.
        learning_rate: learning rate of the tables.
        global_step: the step increments it.
        optimizer: optimizer of the other variables; by default AdaGrad that starts at INITIAL_ACCUMULATOR, with one op
            for all variables of a device.
        dense_learning_rate: learning rate of that AdaGrad; by default `learning_rate`.
        is_trained: tells by its name whether the step changes a table or variable; by default all. The optimizer's
            state of the others is made too, so that a checkpoint keeps it.
    """
    in_tables = {id(variable) for table in tables for variable in table.variables}
    others = [variable for variable in v1.trainable_variables() if id(variable) not in in_tables]
    dense = [variable for variable in others if is_trained(variable.op.name)]
    fixed = [variable for variable in others if not is_trained(variable.op.name)]
    of_tables, of_dense = gradients(loss, tables, dense)
    if optimizer is None:
        steps = _adagrad(dense, of_dense, learning_rate if dense_learning_rate is None else dense_learning_rate)
        _accumulators(fixed, INITIAL_ACCUMULATOR)
    else:
        if fixed:
            optimizer._create_slots(fixed)
        steps = [optimizer.apply_gradients(zip(of_dense, dense, strict=True))] if dense else []
    if global_step is not None:
        # A learning rate that follows the step reads it before.
        rates = [rate for rate in (learning_rate, dense_learning_rate) if tf.is_tensor(rate)]
        with tf.control_dependencies(rates):
            steps.append(global_step.assign_add(1, read_value=False))
    for table, of_table in zip(tables, of_tables, strict=True):
        used = of_table if is_trained(table.name) else [None] * len(of_table)
        steps.append(table.apply_adagrad(used, learning_rate))
    return tf.group(*steps)


def _adagrad(
    variables: Sequence[tf.Variable],
    gradients: Sequence[tf.Tensor | None],
    learning_rate: float | tf.Tensor,
) -> list[tf.Operation]:
    """Applies AdaGrad to dense variables, with one op for all variables of a device."""
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
    """Lets TensorFlow's optimizer make the accumulators, so that they have its names and devices."""
    optimizer = v1.train.AdagradOptimizer(1.0, initial)
    optimizer._create_slots(variables)
    return [optimizer.get_slot(variable, "accumulator") for variable in variables]


def gradients(
    loss: tf.Tensor, tables: Sequence[EmbeddingTable], variables: Sequence[tf.Variable]
) -> tuple[list[list[tf.Tensor | None]], list[tf.Tensor | None]]:
    """Returns the gradients that `minimize` applies, of each table's outputs and of dense variables, to clip or watch.

    A gradient is None where the loss does not depend on the tensor. Gradients of variables under `half_on_wire`
    travel to the ps as 16-bit numbers.
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
    """Adds a moving average of all trainable variables to the training step (Polyak and Juditsky, 1992).

    Args:
        train_op: the training step.
        decay: the share of the average that one step keeps; 0.998 averages over some 500 steps. At the start of
            training, the average is over about as many steps as there were.
        global_step: the step counter, which train_op increments.

    Returns:
        The training step with the average, which takes one pass over all variables every AVERAGE_STEPS steps.
    """
    with tf.control_dependencies([train_op]):
        step = global_step.read_value()
    averages = tf.train.ExponentialMovingAverage(decay**AVERAGE_STEPS, step // AVERAGE_STEPS)
    # This call makes the variables of the averages, which must be made outside of the branch below.
    averages.apply(v1.trainable_variables())
    return tf.cond(tf.equal(step % AVERAGE_STEPS, 0), lambda: averages.apply(v1.trainable_variables()), tf.no_op)


def take_averages() -> tf.Operation:
    """Returns the op that sets each weight to its moving average, for a graph that `average` has been called in."""
    by_name = {variable.op.name: variable for variable in v1.global_variables()}
    steps = []
    for variable in v1.trainable_variables():
        with tf.device(variable.device):
            steps.append(variable.assign(by_name[f"{variable.op.name}/ExponentialMovingAverage"], read_value=False))
    return tf.group(*steps)


def weights_saver(is_average: bool) -> tf.compat.v1.train.Saver:
    """Returns a Saver that restores weights into a graph of the towers: their averages if `is_average`."""
    if not is_average:
        return v1.train.Saver()
    averages = tf.train.ExponentialMovingAverage(0.5)
    trained = {id(variable) for variable in v1.trainable_variables()}
    return v1.train.Saver(
        {
            averages.average_name(variable) if id(variable) in trained else variable.op.name: variable
            for variable in v1.global_variables()
        }
    )


def saver(
    tables: Sequence[EmbeddingTable],
    known: Container[str] | None = None,
    kind: Callable[..., tf.compat.v1.train.Saver] = v1.train.Saver,
    **arguments: Any,
) -> tf.compat.v1.train.Saver:
    """Returns a Saver of all variables of the graph that keeps each table and its accumulator consistent.

    Call it when the training graph is complete, and give it to v1.train.Scaffold. The checkpoints have the usual
    format. Like any Saver, it needs memory for a second table and accumulator while it saves.

    Args:
        tables: all tables of the graph.
        known: names in a checkpoint. Variables of other names are left out; None leaves out none.
        kind: the class to make.
        arguments: arguments of `kind`. The defaults are Estimator's: sharded, save_relative_paths.
    """
    snapshots = [snapshot for table in tables for snapshot in table.snapshots]
    taken = {id(variable) for snapshot in snapshots for variable in snapshot.pair}
    others = v1.global_variables() + v1.get_collection(v1.GraphKeys.SAVEABLE_OBJECTS)
    values = [value for value in others if id(value) not in taken]
    if known is not None:
        snapshots = [each for each in snapshots if all(name_in_checkpoint(part) in known for part in each.pair)]
        values = [v for v in values if not isinstance(v, tf.Variable) or name_in_checkpoint(v) in known]
    # What is left of pieces: moving averages, and with stock ops the pieces themselves.
    values = [_Rows(v) if isinstance(v, tf.Variable) and _piece_of(v) else v for v in values]
    return kind(snapshots + values, **{"sharded": True, "save_relative_paths": True, **arguments})


def name_in_checkpoint(variable: tf.Variable) -> str:
    """Returns the name that a checkpoint has for a variable; pieces of a table have the same."""
    piece = _piece_of(variable)
    if piece is None:
        return str(variable.op.name)
    return piece.variable.rpartition("/part_")[0] + variable.op.name.removeprefix(piece.variable)


def rows_of(variable: tf.Variable) -> list[tuple[int, int]]:
    """Returns the first id and the last id + 1 of each range of rows of a piece of a table, in order.

    It takes what belongs to a piece too, such as its accumulator. Any other variable is one range.
    """
    piece = _piece_of(variable)
    return piece.rows if piece is not None else [(0, int(variable.shape[0]))]


def _piece_of(variable: tf.Variable) -> _Piece | None:
    """Returns the piece that a variable is or belongs to, if there is one."""
    name = variable.op.name
    pieces = v1.get_collection(_PIECES)
    return next((each for each in pieces if f"{name}/".startswith(f"{each.variable}/")), None)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A piece of a table that is placed by rows.

    Attributes:
        variable: name of the variable, "<table>/part_<shard>".
        num_ids: number of rows of the table.
        rows: the first id and the last id + 1 of each range of rows of the piece.
    """

    variable: str
    num_ids: int
    rows: list[tuple[int, int]]


class RowRanges(NamedTuple):
    """Where the rows of a table lie.

    Range r has the ids first_ids[r] to first_ids[r + 1] - 1. It lies in shard shards[r], behind the ranges before it
    that lie there too.

    Attributes:
        first_ids: [ranges + 1], from 0 to the number of ids.
        shards: [ranges], from 0.
    """

    first_ids: list[int]
    shards: list[int]

    def of_shard(self, shard: int) -> list[tuple[int, int]]:
        """Returns the first id and the last id + 1 of each range of a shard, in the order of its rows."""
        ranges = zip(itertools.pairwise(self.first_ids), self.shards, strict=True)
        return [ids for ids, owner in ranges if owner == shard]

    def shifts(self) -> list[int]:
        """Returns the id of each range less its row in the shard, [ranges]."""
        next_rows = dict.fromkeys(self.shards, 0)
        shifts = []
        for (begin, end), shard in zip(itertools.pairwise(self.first_ids), self.shards, strict=True):
            shifts.append(begin - next_rows[shard])
            next_rows[shard] += end - begin
        return shifts


def spread_rows(num_ids: int, num_shards: int, begins: Sequence[int] = (0,)) -> RowRanges:
    """Spreads the rows of a table so that each shard has as many rows as the others, and as many look-ups.

    The most frequent ids of a part of the table are dealt out one by one, the next ones by twos, then by fours, and so
    on: `num_shards` pieces of each size, of which each shard gets one. So there are few ranges, and a checkpoint can
    have the rows in the order of ids. Ids are taken to follow Zipf's law. Of the pieces of a size, the most frequent
    goes to the shard with the fewest look-ups so far.

    Args:
        num_ids: number of rows.
        num_shards: number of shards, at least 1.
        begins: the first ids of the parts of the table, ascending from 0; ids go by frequency within each part.

    Raises:
        ValueError: `begins` does not ascend from 0, or exceeds `num_ids`.
    """
    if not begins or begins[0] != 0 or list(begins) != sorted(begins) or begins[-1] > num_ids:
        raise ValueError(f"begins is {list(begins)}, expected ascending ids from 0 to {num_ids}")
    if num_shards == 1:
        return RowRanges([0, num_ids], [0])
    first_ids: list[int] = []
    shards: list[int] = []
    # Only sums, products and quotients, which are the same on every machine.
    loads = [0.0] * num_shards
    for begin, end in itertools.pairwise([*begins, num_ids]):
        sizes = [0.0] * num_shards
        at, size = begin, 1
        while at < end:
            last = min(end, at + size * num_shards)
            cuts = [at + (last - at) * i // num_shards for i in range(num_shards + 1)]
            pieces = [(a, b) for a, b in itertools.pairwise(cuts) if a < b]
            least = sorted(range(num_shards), key=lambda shard: (loads[shard] + sizes[shard], shard))
            for (a, b), shard in zip(pieces, least, strict=False):
                first_ids.append(a)
                shards.append(shard)
                sizes[shard] += (b - a) / ((a + b + 1) / 2 - begin)
            at, size = last, 2 * size
        # A text has about as many ids of one part as of another.
        total = sum(sizes) or 1.0
        loads = [load + size / total for load, size in zip(loads, sizes, strict=True)]
    return RowRanges([*first_ids, num_ids], shards)


class _Range(NamedTuple):
    """What TensorFlow's initializers of a part of a variable are told."""

    full_shape: list[int]
    var_offset: list[int]


def _initializer(
    initializer: Callable[..., tf.Tensor] | None, num_ids: int, dim: int, rows: Sequence[tuple[int, int]]
) -> Callable[..., tf.Tensor]:
    """Returns the initializer of a table, or of a piece that has some of its rows."""
    if initializer is None:
        return v1.random_uniform_initializer(-(dim**-0.5), dim**-0.5)
    if rows == [(0, num_ids)]:
        return initializer

    def of_ranges(shape: Sequence[int], dtype: tf.DType, partition_info: None = None) -> tf.Tensor:
        parts = [
            initializer([end - begin, dim], dtype=dtype, partition_info=_Range([num_ids, dim], [begin, 0]))
            for begin, end in rows
        ]
        return tf.concat(parts, 0)

    return of_ranges


class GreedyBySize:
    """Places each variable on the ps that has the fewest bytes so far; a `ps_strategy` of replica_device_setter.

    It counts anew in each graph, so that all processes of a cluster, restarted ones too, place variables alike. Make
    the largest tables first for the best balance.
    """

    def __init__(self, num_ps: int):
        """`num_ps` is the number of parameter servers."""
        self._num_ps = num_ps
        self._bytes: weakref.WeakKeyDictionary[tf.Graph, list[int]] = weakref.WeakKeyDictionary()

    def __call__(self, op: tf.Operation) -> int:
        """Returns the task index of the ps for a variable's op."""
        loads = self._bytes.setdefault(op.graph, [0] * self._num_ps)
        task = loads.index(min(loads))
        if op.type == "VarHandleOp":
            shape = tf.TensorShape(op.get_attr("shape"))
            loads[task] += (shape.num_elements() or 0) * tf.as_dtype(op.get_attr("dtype")).size
        return task


def device_function(run_config: tf.estimator.RunConfig) -> Callable[[tf.Operation], str] | None:
    """Returns a `device_fn` for RunConfig: Estimator's own placement, but with variables spread over the ps by size.

    Without ps it returns None, as RunConfig expects. It also loads the op library, so that a ps has it.
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
    """A custom getter that halves the traffic of the towers' dense weights between ps and worker.

        with v1.variable_scope(v1.get_variable_scope(), custom_getter=half_on_wire):
            ...  # build the towers

    The ps keeps weights and accumulators in float32 and applies float32 AdaGrad. A weight travels as float16, which has
    11 significant bits and suits small numbers. Its gradient travels as bfloat16, which has 8 significant bits and any
    magnitude. Each travels once in a step, however often the graph reads the weight. Embedding tables, and variables
    that are not on a ps, are not affected.

    Take the gradients with `minimize` or `gradients`. They leave out terms of the loss that read the variable itself
    and not the tensor that get_variable returned.
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
    """The implementation with our ops: each call sends one packed array of ids to each shard."""

    def __init__(
        self,
        variables: list[tf.Variable],
        ranges: RowRanges,
        initial_accumulator: float,
        decay: float,
        exclusive: bool,
    ):
        self._ops = ops.load()
        self._variables, self._initial_accumulator, self._exclusive = variables, initial_accumulator, exclusive
        self._ranges, self._decay = ranges, decay
        self._packed: list[list[tf.Tensor]] = []  # for each output, the packed ids for each shard
        self._accumulators: list[tf.Variable] = []

    def sums(self, lists: Sequence[Tokens], weights: Sequence[tf.Tensor] | None) -> tf.Tensor:
        packed = self._ops.dpsr_pack_tokens(
            values=[tokens.values for tokens in lists],
            row_splits=[tokens.row_splits for tokens in lists],
            weights=weights or [],
            num_shards=len(self._variables),
            first_rows=self._ranges.first_ids,
            shards=self._ranges.shards,
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

    def rows(self, codes: tf.Tensor) -> tf.Tensor | None:
        """Returns None: rows are sums of one row each."""
        return None

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
                        decay=self._decay,
                    )
                )
        return tf.group(*steps)

    def snapshots(self) -> list[saveable_object.SaveableObject]:
        return [_Snapshot(*pair) for pair in zip(self._variables, self._accumulators, strict=False)]


def segment_ids(row_splits: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    """Returns the segment of each value, int32 [count].

    Each op of a graph costs a server some microseconds for each request. This takes six; TensorFlow's
    `row_splits_to_segment_ids` takes some forty.

    Args:
        row_splits: int64 [segments + 1], from 0 to `count`; segment i has the values from row_splits[i] to before
            row_splits[i + 1].
        count: number of values, int64 [].
    """
    # Value v is in segment i if i ends are not above v. Reshaping tells the rank, which some inputs of graphs do not.
    ends = tf.reshape(row_splits, [1, -1])[:, 1:]
    return tf.raw_ops.UpperBound(sorted_inputs=ends, values=tf.range(count)[tf.newaxis])[0]


class _Stock:
    """The implementation with TensorFlow's ops, which run on the tables' devices, gradients included."""

    def __init__(self, variables: list[tf.Variable], ranges: RowRanges, initial_accumulator: float):
        self._variables, self._ranges, self._initial_accumulator = variables, ranges, initial_accumulator

    def sums(self, lists: Sequence[Tokens], weights: Sequence[tf.Tensor] | None) -> tf.Tensor:
        if len(lists) == 1:
            values, row_splits = lists[0]
        else:
            values = tf.concat([tokens.values for tokens in lists], 0)
            lengths = tf.concat([tokens.row_splits[1:] - tokens.row_splits[:-1] for tokens in lists], 0)
            row_splits = tf.concat([[0], tf.cumsum(lengths)], 0)
        weight = None if weights is None else tf.concat(weights, 0)
        if len(self._variables) == 1:
            return self._sum(self._variables[0], values, row_splits, weight)
        # Find the shard and the row of each id; then, for each shard, its ids and how many of them each text has.
        found = tf.searchsorted(self._ranges.first_ids, values, side="right") - 1
        # An id that is too large is in the last range, and out of the rows of its shard.
        found = tf.minimum(found, len(self._ranges.shards) - 1)
        shards = tf.gather(self._ranges.shards, found)
        rows = values - tf.gather(self._ranges.shifts(), found)
        segments = segment_ids(row_splits, tf.size(values, tf.int64))
        sums = []
        for i, variable in enumerate(self._variables):
            own = tf.where(tf.equal(shards, i))[:, 0]
            in_text = tf.math.unsorted_segment_sum(
                tf.ones_like(own), tf.gather(segments, own), tf.size(row_splits, out_type=tf.int64) - 1
            )
            sums.append(
                self._sum(
                    variable,
                    tf.gather(rows, own),
                    tf.concat([[0], tf.cumsum(in_text)], 0),
                    None if weight is None else tf.gather(weight, own),
                )
            )
        return tf.add_n(sums)

    def rows(self, codes: tf.Tensor) -> tf.Tensor | None:
        """Returns the rows of `codes`, or None if they are in several shards."""
        if len(self._variables) > 1:
            return None
        with tf.device(self._variables[0].device):
            return tf.gather(self._variables[0], codes)

    def _sum(
        self, variable: tf.Variable, values: tf.Tensor, row_splits: tf.Tensor, weights: tf.Tensor | None
    ) -> tf.Tensor:
        with tf.device(variable.device):
            rows = tf.gather(variable, values)
            if weights is not None:
                rows *= weights[:, tf.newaxis]
            if row_splits.shape == [2]:
                # A ranker's graph reads one text. Two ops are cheaper for a server than eight.
                return tf.reduce_sum(rows, 0, keepdims=True)
            segments = segment_ids(row_splits, tf.size(values, tf.int64))
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


class _Rows(saveable_object.SaveableObject):
    """Saves variables of one piece of a table, each as slices of the table in a checkpoint."""

    def __init__(self, *variables: tf.Variable):
        self._variables = variables
        specs = []
        with tf.device(variables[0].device):
            for variable, value in zip(variables, self._values(), strict=True):
                name, piece = name_in_checkpoint(variable), _piece_of(variable)
                if piece is None:
                    specs.append(saveable_object.SaveSpec(value, "", name, variable.dtype, variable.device))
                    continue
                sizes = [end - begin for begin, end in piece.rows]
                for (begin, _), size, part in zip(piece.rows, sizes, tf.split(value, sizes), strict=True):
                    dim = int(variable.shape[1])
                    where = f"{piece.num_ids} {dim} {begin},{size}:0,{dim}"
                    specs.append(saveable_object.SaveSpec(part, where, name, variable.dtype, variable.device))
        super().__init__(variables[0].handle, specs, variables[0].op.name)

    def _values(self) -> Sequence[tf.Tensor]:
        return [variable.read_value() for variable in self._variables]

    def restore(self, restored_tensors: Sequence[tf.Tensor], restored_shapes: Any) -> tf.Operation:
        """Assigns all variables. Raises InvalidArgumentError if the checkpoint has another shape."""
        parts = len(restored_tensors) // len(self._variables)
        assigned = []
        for i, variable in enumerate(self._variables):
            with tf.device(variable.device):
                value = tf.concat(restored_tensors[i * parts : (i + 1) * parts], 0)
                assigned.append(variable.assign(tf.ensure_shape(value, variable.shape), read_value=False))
        return tf.group(*assigned)


class _Snapshot(_Rows):
    """Saves a table or one of its pieces, together with its accumulator. One op reads both under their locks."""

    def __init__(self, variable: tf.Variable, accumulator: tf.Variable):
        self.pair = (variable, accumulator)
        super().__init__(*self.pair)

    def _values(self) -> Sequence[tf.Tensor]:
        return ops.load().dpsr_embedding_snapshot(*(variable.handle for variable in self.pair))


@tf.RegisterGradient("DpsrEmbeddingBag")
def _no_gradient(op: tf.Operation, gradient: tf.Tensor) -> None:
    raise LookupError(
        f"{op.name}: an embedding table has no gradient with respect to its variable; take the gradients of "
        "EmbeddingTable.outputs and give them to apply_adagrad, or use dpsr_tf.models.embedding.minimize"
    )


def _check(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{what} is {value!r}, expected one of {', '.join(map(repr, allowed))}")


def _dense(gradient: tf.Tensor | tf.IndexedSlices | None) -> tf.Tensor | None:
    # The gradient of a gather from the pooled vectors is sparse.
    return tf.convert_to_tensor(gradient) if isinstance(gradient, tf.IndexedSlices) else gradient


def _num_texts(tokens: Tokens) -> tf.Tensor:
    return tf.size(tokens.row_splits) - 1


def _norm(tokens: Tokens, weights: tf.Tensor | None, combiner: str) -> tf.Tensor:
    """Returns the divisor of the sum of each text, float32 [texts]."""
    if weights is None:
        total = tf.cast(tokens.row_splits[1:] - tokens.row_splits[:-1], tf.float32)
    else:
        total = tf.math.unsorted_segment_sum(
            weights if combiner == "mean" else tf.square(weights),
            segment_ids(tokens.row_splits, tf.size(weights, tf.int64)),
            _num_texts(tokens),
        )
    return total if combiner == "mean" else tf.sqrt(total)
