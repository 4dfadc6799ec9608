"""The bugs. Each is one replacement in one file, and the tests that must fail under it.

Where other stacks have had the bug, `resembles` names the thread: "Megatron-LM #n" is an issue or pull request of
NVIDIA/Megatron-LM, "Bridge" NVIDIA-NeMo/Megatron-Bridge, "Energon" NVIDIA/Megatron-Energon.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One bug."""

    name: str
    resembles: str
    """What goes wrong, and where it has gone wrong before."""

    file: str
    old: str
    """Text that stands in the file exactly once."""

    new: str
    tests: tuple[str, ...]
    """pytest ids of tests of which at least one must fail."""


VERIFIED = "tests/distributed/test_verification.py::test_a_layout_that_agrees_is_verified"
TENSOR, CONTEXT = (f"{VERIFIED}[tp2_sp]",), (f"{VERIFIED}[cp2]",)
SEEDS = ("tests/unit/runtime/test_rng.py",)
BATCH = "tests/unit/data/test_batch.py"
WINDOWS = "tests/unit/data/test_windows.py"
RESILIENCE = "tests/integration/test_resilience.py"
PRETRAIN = "tests/integration/test_pretrain.py"
RESUMED = (f"{PRETRAIN}::test_stop_and_resume_is_the_straight_run_bit_for_bit",)
WITHOUT_CONTEXT = 'type({0})(**(vars({0}) | {{"dp_cp": {0}.dp}}))'

GRADIENTS = (
    Mutant(
        name="norm not marked for sequence parallelism",
        resembles="the gradient of a norm is that of one tensor rank's tokens (Megatron-LM #7452)",
        file="megatron_ext/model/specs.py",
        old="self.weight.sequence_parallel = config.sequence_parallel",
        new="self.weight.sequence_parallel = False",
        tests=TENSOR,
    ),
    Mutant(
        name="gradients not reduced over the context axis",
        resembles="context ranks train on their own tokens and drift apart (Megatron-LM #7452)",
        file="megatron_ext/optim/build.py",
        old="        module=model,\n        pg_collection=topology.groups,\n",
        new=f"        module=model,\n        pg_collection={WITHOUT_CONTEXT.format('topology.groups')},\n",
        tests=CONTEXT,
    ),
    Mutant(
        name="gradient of gathered keys and values not reduce-scattered",
        resembles="a context rank drops what the other ranks' queries ask of its keys (Megatron-LM #7452)",
        file="megatron_ext/model/cp_attention.py",
        old="gather_from_sequence_parallel_region(both, group=self.context_group)",
        new="gather_from_sequence_parallel_region(both, tensor_parallel_output_grad=False, group=self.context_group)",
        tests=CONTEXT,
    ),
    Mutant(
        name="gradient of the head's input not summed over the tensor axis",
        resembles="each tensor rank passes back what its own vocabulary rows say (Megatron-LM #7452)",
        file="megatron_ext/model/lm_head.py",
        old="tensor_parallel_output_grad=True",
        new="tensor_parallel_output_grad=False",
        tests=TENSOR,
    ),
    Mutant(
        name="gradients not cleared between steps",
        resembles="every step adds the gradients of all steps before it, and of the dry step",
        file="megatron_ext/train/loop.py",
        old="        self.optimizer.zero_grad()\n        losses = self.runner.run(microbatches",
        new="        losses = self.runner.run(microbatches",
        tests=RESUMED,
    ),
)

LOSSES = (
    Mutant(
        name="loss scaled by the context-parallel size",
        resembles="the gradient norm grows with the context axis (Megatron-LM #673, #936)",
        file="megatron_ext/train/step.py",
        old="return result.loss_sum, result.weight_sum, {}",
        new="return result.loss_sum * self.topology.context_parallel_size, result.weight_sum, {}",
        tests=CONTEXT,
    ),
    Mutant(
        name="mean of local means",
        resembles="microbatches and ranks count alike, however many labels they have (Megatron-LM #4590)",
        file="megatron_ext/model/emu3.py",
        old="calculate_per_token_loss=True",
        new="calculate_per_token_loss=False",
        tests=CONTEXT,
    ),
    Mutant(
        name="weights not counted over the context axis",
        resembles="the gradient is divided by one context rank's labels (Megatron-LM #7513)",
        file="megatron_ext/train/step.py",
        old="            pg_collection=self.topology.groups,\n",
        new=f"            pg_collection={WITHOUT_CONTEXT.format('self.topology.groups')},\n",
        tests=CONTEXT,
    ),
    Mutant(
        name="logged losses not reduced over the context axis",
        resembles="the curve shows one context rank's tokens (verl #6609)",
        file="megatron_ext/train/step.py",
        old="dist.all_reduce(sums, group=self.topology.groups.dp_cp)",
        new="dist.all_reduce(sums, group=self.topology.groups.dp)",
        tests=CONTEXT,
    ),
    Mutant(
        name="weight decided by the input id",
        resembles="off by one at every border of text and picture (swiss-ai/Megatron-LM #102)",
        file="megatron_ext/objectives/next_token.py",
        old="self.weights(batch.labels_BT, batch.label_mask_BT)",
        new="self.weights(batch.tokens_BT, batch.label_mask_BT)",
        tests=("tests/unit/objectives/test_next_token.py",),
    ),
    Mutant(
        name="padded vocabulary rows in the softmax",
        resembles="the loss depends on the tensor-parallel size (Megatron-LM #1754, Bridge #5375)",
        file="megatron_ext/model/emu3.py",
        old="self.output_layer.loss(logits, labels, self.real_rows)",
        new="self.output_layer.loss(logits, labels, self.output_layer.weight.size(0))",
        tests=("tests/unit/model/test_lm_head.py",),
    ),
)

BATCHES = (
    Mutant(
        name="wrong zig-zag order",
        resembles="attention takes chunks for others than they are (Megatron-LM #5243)",
        file="megatron_ext/data/batch.py",
        old="second_n = starts_n + (chunks - 1 - context_rank) * sizes_n",
        new="second_n = starts_n + (context_size + context_rank) * sizes_n",
        tests=(BATCH,),
    ),
    Mutant(
        name="gathered keys not put back in row order",
        resembles="queries see the keys of other positions (Megatron-LM #4494)",
        file="megatron_ext/model/cp_attention.py",
        old="gathered.index_select(0, order.argsort())",
        new="gathered.index_select(0, order)",
        tests=CONTEXT,
    ),
    Mutant(
        name="keys of another document visible",
        resembles="attention is not reset at documents (Megatron-LM #954)",
        file="megatron_ext/model/cp_attention.py",
        old="chunks.append((slice(start, end), slice(start, end)))",
        new="chunks.append((slice(start, end), slice(0, end)))",
        tests=("tests/unit/model/test_cp_attention.py",),
    ),
    Mutant(
        name="keys of another document visible under context parallelism",
        resembles="only the context-parallel path forgets the documents (TransformerEngine #1930)",
        file="megatron_ext/model/cp_attention.py",
        old="seen = slice(start, start + (part + 1) * length)",
        new="seen = slice(0, start + (part + 1) * length)",
        tests=("tests/unit/model/test_cp_attention.py",),
    ),
    Mutant(
        name="position ids not restarting",
        resembles="positions run over the whole row (Megatron-LM #415)",
        file="megatron_ext/data/batch.py",
        old="positions = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))",
        new="positions = np.arange(cu_seqlens[-1])",
        tests=(BATCH,),
    ),
    Mutant(
        name="RoPE base of the shape dropped",
        resembles="the model trains, and no other stack can read it (swiss-ai/Megatron-LM #85)",
        file="megatron_ext/model/emu3.py",
        old="rotary_base=shape.rotary_base",
        new="rotary_base=10_000.0",
        tests=("tests/parity/test_hf_decoder.py::test_logits_equal",),
    ),
    Mutant(
        name="labels not shifted",
        resembles="the model learns to repeat its input (Megatron-LM #7498)",
        file="megatron_ext/data/windows.py",
        old="labels[piece.begin : last] = piece_ids[1:]",
        new="labels[piece.begin : last] = piece_ids[:-1]",
        tests=(WINDOWS,),
    ),
    Mutant(
        name="label mask one position too long",
        resembles="the last id of a document is trained to predict padding (Megatron-LM #7498)",
        file="megatron_ext/data/windows.py",
        old="mask[piece.begin : last] = True",
        new="mask[piece.begin : last + 1] = True",
        tests=(WINDOWS,),
    ),
    Mutant(
        name="padding masked by its id",
        resembles="where padding and the end of a text share an id, ends are never learnt (Bridge #4660)",
        file="megatron_ext/data/windows.py",
        old="mask[piece.begin : last] = True",
        new="mask[piece.begin : last] = piece_ids[1:] != self._pad",
        tests=(WINDOWS,),
    ),
    Mutant(
        name="data order that depends on the layout",
        resembles="data ranks shuffle for themselves: windows are seen twice or never (Energon #71, Bridge #5637)",
        file="megatron_ext/data/loader.py",
        old="[len(dataset) for dataset in datasets], train.seed,",
        new="[len(dataset) for dataset in datasets], train.seed + topology.data_parallel_rank,",
        tests=("tests/unit/data/test_loader.py",),
    ),
)

PLACE = "place = (seed, step, microbatch, topology.data_parallel_rank, topology.context_parallel_rank)"


def _seed_without(part: str) -> Mutant:
    return Mutant(
        name=f"dropout seed without the {part.split('.')[-1].replace('_parallel', '').replace('_', ' ')}",
        resembles="the same masks again and again (megatron-core seeds by the tensor rank alone)",
        file="megatron_ext/runtime/rng.py",
        old=PLACE,
        new=PLACE.replace(f", {part}", ""),
        tests=SEEDS,
    )


RANDOMNESS = (
    *map(_seed_without, ("step", "microbatch", "topology.data_parallel_rank", "topology.context_parallel_rank")),
    Mutant(
        name="tensor ranks with different replicated dropout",
        resembles="what every tensor rank should hold alike is dropped differently, and replicas drift apart",
        file="megatron_ext/runtime/rng.py",
        old='derive_seed(*place, "replicated")',
        new='derive_seed(*place, "replicated", topology.tensor_parallel_rank)',
        tests=SEEDS,
    ),
    Mutant(
        name="tensor ranks with the same sharded dropout",
        resembles="the same mask on every shard of the heads",
        file="megatron_ext/runtime/rng.py",
        old='derive_seed(*place, "sharded", topology.tensor_parallel_rank)',
        new='derive_seed(*place, "sharded")',
        tests=SEEDS,
    ),
    Mutant(
        name="initial weights that depend on the tensor rank",
        resembles="another model for every tensor-parallel size",
        file="megatron_ext/model/initialize.py",
        old='derive_seed(seed, "weights", name)',
        new='derive_seed(seed, "weights", name, rank)',
        tests=TENSOR,
    ),
    Mutant(
        name="gate and up halves of the MLP sharded as one",
        resembles="some tensor ranks hold only gates, others only values (Megatron-LM #7452)",
        file="megatron_ext/model/initialize.py",
        old="if name.endswith(GATED):",
        new="if not name:",
        tests=TENSOR,
    ),
)

UPDATES = (
    Mutant(
        name="weight decay on norms",
        resembles="upstream only marks the groups; whoever brings a scheduler must apply the mark",
        file="megatron_ext/optim/build.py",
        old='self.optim.weight_decay * group.get("wd_mult", 1.0)',
        new="self.optim.weight_decay",
        tests=("tests/unit/optim/test_build.py",),
    ),
    Mutant(
        name="norms of a kind of weight count replicas",
        resembles="a weight that tensor ranks hold in common is in the gradient's norm once per rank",
        file="megatron_ext/optim/gradient_groups.py",
        old='if not getattr(weight, "tensor_model_parallel", False) and topology.tensor_parallel_rank > 0:',
        new="if False:",
        tests=(
            "tests/distributed/test_layouts.py::test_layout_agrees_with_one_process[tp2-cp1-dp1-window-4-full-grads-qk-several]",
        ),
    ),
    Mutant(
        name="learning-rate schedule off by one",
        resembles="the first step has learning rate 0",
        file="megatron_ext/train/loop.py",
        old="self.optimizer.apply(state.step + 1, grad_norm)",
        new="self.optimizer.apply(state.step, grad_norm)",
        tests=(f"{PRETRAIN}::test_init_from_takes_weights_only",),
    ),
    Mutant(
        name="learning-rate schedule begins anew after resume",
        resembles="every restart warms up again (Megatron-LM #1570)",
        file="megatron_ext/train/loop.py",
        old="self.optimizer.apply(state.step + 1, grad_norm)",
        new='self.optimizer.apply(state.step + 1 - self.__dict__.setdefault("first_step", state.step), grad_norm)',
        tests=RESUMED,
    ),
    Mutant(
        name="data from the beginning after resume",
        resembles="saved, but not restored: the run reads its first windows again (Bridge #3993)",
        file="megatron_ext/train/initial.py",
        old="return TrainState.from_dict(saved)",
        new='return TrainState.from_dict({**saved, "consumed_samples": 0})',
        tests=RESUMED,
    ),
    Mutant(
        name="datasets from their beginning after a change of weights",
        resembles="a new blend is a new shuffle: windows are read twice in an epoch, others never",
        file="megatron_ext/data/progress.py",
        old="consumed = tuple(theirs.consumed if theirs else 0 for theirs in found)",
        new="consumed = tuple(0 for theirs in found)",
        tests=("tests/unit/data/test_progress.py",),
    ),
    Mutant(
        name="one Adam step for all parameters after a load",
        resembles="megatron-core's own: bias correction runs away after a resume (docs/numerics.md)",
        file="megatron_ext/checkpoint/repairs.py",
        old='state["step"] = state["step"].clone()',
        new='state["step"] = state["step"]',
        tests=("tests/distributed/test_resume.py::test_resume_is_bitwise_on_the_same_layout[fp32-fully_reshardable]",),
    ),
    Mutant(
        name="optimizer state saved shifted by the padding of gradient buckets",
        resembles="megatron-core's own, with two buckets and more (Megatron-LM #5077)",
        file="megatron_ext/checkpoint/repairs.py",
        old="        buffer.param_index_map = _unpadded(buffer)\n",
        new="        pass\n",
        tests=("tests/distributed/test_resume.py::test_resume_is_bitwise_on_two_ranks[DP 2]",),
    ),
    Mutant(
        name="a checkpoint that contradicts itself is saved and resumed from",
        resembles="what was saved shifted trains on, 5 % worse, and nothing says so (Megatron-LM #5077)",
        file="megatron_ext/checkpoint/consistency.py",
        old="    if not wrong:\n",
        new="    if True:\n",
        tests=("tests/distributed/test_optimizer_state.py",),
    ),
    Mutant(
        name="settings of Adam from the checkpoint",
        resembles="a resume with other betas trains with the old ones (docs/upstream_group_keys.md)",
        file="megatron_ext/checkpoint/repairs.py",
        old='return [{**group, "step": int(updates)} for group in settings]',
        new="return list(saved)",
        tests=("tests/unit/checkpoint/test_adam_groups.py",),
    ),
    Mutant(
        name="a bad step changes the weights all the same",
        resembles="the norm is looked at after the update",
        file="megatron_ext/train/loop.py",
        old="        if fault is None:\n",
        new="        if True:\n",
        tests=(f"{RESILIENCE}::test_a_spike_is_skipped",),
    ),
    Mutant(
        name="a rewound run meets the bad batch again",
        resembles="the data position goes back with the weights",
        file="megatron_ext/train/loop.py",
        old="        state = state.past_the_passed_over()\n",
        new="",
        tests=(f"{RESILIENCE}::test_a_spike_is_rewound_and_passed_over",),
    ),
    Mutant(
        name="a second rewind to a checkpoint forgets the first",
        resembles="two bad batches between two saves send the run back and forth",
        file="megatron_ext/train/state.py",
        old="sorted({*saved.passed_over, *ahead, found})",
        new="sorted({*saved.passed_over, found})",
        tests=("tests/unit/train/test_state.py",),
    ),
    *(
        Mutant(
            name=f"master weights not reloaded after init_from a {kind}",
            resembles="the first update puts the random weights back",
            file=file,
            old=text,
            new="pass",
            tests=(f"tests/unit/train/test_initial.py::test_the_first_update_starts_from_the_given_weights[{case}]",),
        )
        for kind, case, file, text in (
            ("checkpoint", "checkpoint", "megatron_ext/checkpoint/decoder.py", "self.inner.reload_model_params()"),
            ("Hugging Face folder", "hf", "megatron_ext/train/initial.py", "optimizer.inner.reload_model_params()"),
        )
    ),
)

MUTANTS = (*GRADIENTS, *LOSSES, *BATCHES, *RANDOMNESS, *UPDATES)
