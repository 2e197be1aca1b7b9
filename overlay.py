"""The new rows of a frozen language model: look-up, logits and loss over base + new vocabulary.

    overlay = WakeOverlay(model, len(tokenizer), input_rows, output_rows)  # or None: shared
    overlay.install()      # model(**inputs) and model.generate() now know the new ids
    overlay.uninstall()    # the untouched model again

The base tables are never resized, written or given a gradient. Ids below first_new_id come from
them, ids from first_new_id on from the overlay, so padding rows of the base table never matter.
Training does not go through autograd's dense gradients: `embed` gives the body its inputs,
`chunked_cross_entropy` gives loss and gradients chunk by chunk, `add_input_gradient` adds to the
rows that were used.
"""

import math

import torch
from torch import Tensor, nn

# 256 positions x 152,064 fp32 logits: 149 MiB, three elementwise passes. More gained nothing.
LOSS_CHUNK_POSITIONS = 256
# All new-row logits of so many positions are held at once: 2,048 x 44,223 fp32 = 345 MiB.
LOSS_GROUP_POSITIONS = 2048
# New rows are cast to the compute dtype this many at a time, never all: 4,096 x 5,120 bf16, 40 MiB.
ROW_BLOCK = 4096
# float16 keeps 6e-8 at the least; a softmax over 195,888 tokens has entries of 5e-6. Scaled by this
# exact power of two they keep their precision, and the largest, 1, stays far below 65,504.
FLOAT16_SOFTMAX_SCALE = 1024.0


class OverlayError(ValueError):
    """The model has an embedding or head that the overlay cannot serve exactly; one line."""

    def __init__(self, problem: str):
        super().__init__(problem)
        self.problems = [problem]


def dense_weight(module: nn.Module) -> Tensor:
    """(rows, hidden) weight of an embedding or head; a 4-bit one is dequantized."""
    weight = module.weight
    if getattr(weight, "quant_state", None) is not None:
        import bitsandbytes.functional

        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    if not weight.dtype.is_floating_point:
        raise OverlayError(
            f"{type(module).__name__} holds {weight.dtype} weights; the overlay reads float or NF4"
            " tables: load the model with quantization nf4 or none"
        )
    return weight.detach()


def add_rows_(target: Tensor, place: Tensor, rows: Tensor) -> None:
    """target[place[i]] += rows[i] for every i, to the same bits each time.

    On a GPU index_add_ adds in any order and index_put_ sorts first; on a CPU index_add_ goes
    through the rows one after another.
    """
    if target.is_cuda:
        target.index_put_((place,), rows, accumulate=True)
    else:
        target.index_add_(0, place, rows)


def subtoken_mean(table: Tensor, spellings: list[list[int]]) -> Tensor:
    """Mean of the rows of the tokens that spelled each word; one token gives an exact copy.

    Shapes: table (rows, hidden), any float dtype and device; spellings: one id list a word
            -> (len(spellings), hidden) fp32 on the table's device
    Memory: the gathered rows of ROW_BLOCK words in fp32
    Source: Hewitt, "Initializing new word embeddings", takes the mean of all rows; a mean of the
            word's own pieces keeps words apart (see README, "What is learnt")
    """
    rows = torch.empty(len(spellings), table.shape[1], device=table.device)
    for start in range(0, len(spellings), ROW_BLOCK):
        block = spellings[start : start + ROW_BLOCK]
        lengths = torch.tensor([len(ids) for ids in block], device=table.device)
        pieces = table[torch.tensor([i for ids in block for i in ids], device=table.device)].float()
        word = torch.repeat_interleave(torch.arange(len(block), device=table.device), lengths)
        sums = torch.zeros(len(block), table.shape[1], device=table.device)
        add_rows_(sums, word, pieces)
        rows[start : start + len(block)] = sums / lengths[:, None]
    return rows


def spherical_rows(table: Tensor, num_rows: int, radius: float, seed: int) -> Tensor:
    """Random directions of norm radius x std(table) x sqrt(hidden_size), as the first runs started.

    Shapes: table (rows, hidden) -> (num_rows, hidden) fp32 on the table's device. The numbers are
    drawn on the CPU, so that a seed means the same rows on every machine.
    """
    count, total, squares = table.numel(), 0.0, 0.0
    for block in table.split(ROW_BLOCK):  # a 152,064 x 5,120 table in fp32 at once would be 2.9 GiB
        total += block.double().sum().item()
        squares += block.double().square().sum().item()
    std = math.sqrt((squares - total * total / count) / (count - 1))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, table.shape[1], generator=generator)
    rows *= radius * std * math.sqrt(table.shape[1]) / rows.norm(dim=1, keepdim=True)
    return rows.to(table.device)


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32; of half-precision GPU operands the tensor cores sum and return fp32."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()  # a CPU has no such product; the library's loss rounds so too


def softmax_minus_target(base: Tensor, new: Tensor, labels: Tensor, first_new_id: int) -> Tensor:
    """Turn logits into d(loss)/d(logits) in place; rows with a negative label become zero.

    Shapes: base (T, base columns), new (T, new columns) fp32; labels (T,) int64
            -> losses (T,) fp32
    """
    position = torch.arange(len(labels), device=labels.device)
    in_base, valid = labels < first_new_id, labels >= 0
    base_label = torch.where(in_base & valid, labels, 0)
    largest = base.amax(dim=1)
    target = base[position, base_label]
    if new.shape[1]:
        new_label = torch.where(in_base, 0, labels - first_new_id)
        largest = torch.maximum(largest, new.amax(dim=1))
        target = torch.where(in_base, target, new[position, new_label])
    total = base.sub_(largest[:, None]).exp_().sum(dim=1)
    if new.shape[1]:
        total += new.sub_(largest[:, None]).exp_().sum(dim=1)
    losses = torch.where(valid, largest + total.log() - target, 0.0)
    weight = torch.where(valid, 1.0 / total, 0.0)[:, None]
    base.mul_(weight)
    base[position, base_label] -= (in_base & valid).float()
    if new.shape[1]:
        new.mul_(weight)
        new[position, new_label] -= (~in_base).float()
    return losses


def chunked_cross_entropy(
    hidden_states: Tensor,
    labels: Tensor,
    base_rows: Tensor,
    first_new_id: int,
    new_rows: Tensor | None = None,
    new_rows_grad: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Cross entropy over base + new rows without ever holding all logits. Equals

        logits = cat([hidden @ base_rows[:first_new_id].T, hidden @ new_rows.T], dim=1)
        losses = F.cross_entropy(logits.float(), labels, reduction="none", ignore_index=-100)

    With `scale` also the gradient of scale * losses.sum(): returned for hidden_states, and added
    into new_rows_grad where one is given.

    Shapes: hidden_states (T, H) compute dtype; labels (T,) int64, negative = ignored;
            base_rows (>= first_new_id, H) compute dtype, frozen; new_rows (N, H) fp32;
            new_rows_grad (N, H) fp32 -> losses (T,) fp32 nats, gradient (T, H) fp32 or None
    Memory: fp32 logits of LOSS_CHUNK_POSITIONS positions over the base rows, and of
            LOSS_GROUP_POSITIONS over the new ones; T = 2,048, H = 5,120, 152k + 44k rows: 0.6 GiB
    Source: gradients in the forward pass as in Liger-Kernel's fused linear cross entropy; here only
            the new rows have one, so the base head is read twice and never written.
    """
    if len(labels) > LOSS_GROUP_POSITIONS:
        groups = zip(hidden_states.split(LOSS_GROUP_POSITIONS), labels.split(LOSS_GROUP_POSITIONS))
        shared = base_rows, first_new_id, new_rows, new_rows_grad, scale, softcap
        losses, grads = zip(*(chunked_cross_entropy(*group, *shared) for group in groups))
        return torch.cat(losses), None if scale is None else torch.cat(grads)
    # 151,665 columns are misaligned for GEMMs
    base_rows = base_rows[: -(-first_new_id // 64) * 64]
    if new_rows is None:
        new_rows = hidden_states.new_empty(0, hidden_states.shape[1], dtype=torch.float32)
    dtype, device = hidden_states.dtype, labels.device
    softmax_scale = FLOAT16_SOFTMAX_SCALE if dtype == torch.float16 else 1.0
    blocks = [slice(start, start + ROW_BLOCK) for start in range(0, len(new_rows), ROW_BLOCK)]
    new_logits = torch.empty(len(labels), len(new_rows), device=device)
    for block in blocks:
        new_logits[:, block] = matmul_fp32(hidden_states, new_rows[block].to(dtype).T)
    losses = torch.empty(len(labels), device=device)
    grad_hidden = None if scale is None else torch.empty_like(hidden_states, dtype=torch.float32)
    for start in range(0, len(labels), LOSS_CHUNK_POSITIONS):
        chunk = slice(start, start + LOSS_CHUNK_POSITIONS)
        base, new = matmul_fp32(hidden_states[chunk], base_rows.T), new_logits[chunk]
        slopes = [soft_cap_(logits, softcap) for logits in (base, new)]  # None without a cap
        base[:, first_new_id:] = -math.inf  # padding rows of the table are no tokens
        losses[chunk] = softmax_minus_target(base, new, labels[chunk], first_new_id)
        if grad_hidden is None:
            continue
        if softcap:
            base.mul_(slopes[0])
            new.mul_(slopes[1])
        grad_hidden[chunk] = matmul_fp32(base.mul_(softmax_scale).to(dtype), base_rows)
    if grad_hidden is not None:
        for block in blocks:
            d_logits = new_logits[:, block].mul_(softmax_scale).to(dtype)
            grad_hidden += matmul_fp32(d_logits, new_rows[block].to(dtype))
            if new_rows_grad is not None:
                d_rows = matmul_fp32(d_logits.T, hidden_states)
                new_rows_grad[block].add_(d_rows, alpha=scale / softmax_scale)
        grad_hidden *= scale / softmax_scale
    return losses, grad_hidden


def soft_cap_(logits: Tensor, softcap: float | None) -> Tensor | None:
    """softcap * tanh(logits / softcap) in place, as Gemma 2 does; returns d(capped)/d(logits)."""
    if not softcap:
        return None
    logits.div_(softcap).tanh_()
    slope = 1.0 - logits.square()
    logits.mul_(softcap)
    return slope


class OverlayEmbedding(nn.Module):
    """What stands in the model's place for its input embedding while the overlay is installed."""

    def __init__(self, overlay: "WakeOverlay"):
        super().__init__()
        self.rows = overlay.input_rows  # first parameter, so model.device is where the rows are
        self.overlay = [overlay]  # in a list: its base table is no parameter of this module

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.overlay[0].embed(input_ids)


class OverlayHead(nn.Module):
    """What stands in the model's place for its output head: logits over base + new vocabulary."""

    def __init__(self, overlay: "WakeOverlay"):
        super().__init__()
        self.rows = overlay.logit_rows
        self.overlay = [overlay]

    def forward(self, hidden_states: Tensor) -> Tensor:
        overlay = self.overlay[0]
        base = nn.functional.linear(hidden_states, overlay.base_rows[: overlay.first_new_id])
        # generating: reading fp32 rows beats casting them all
        if hidden_states.shape[:-1].numel() <= 8:
            new = nn.functional.linear(hidden_states.float(), self.rows).to(base.dtype)
        else:
            new = nn.functional.linear(hidden_states, self.rows.to(hidden_states.dtype))
        return torch.cat([base, new], dim=-1)


class WakeOverlay(nn.Module):
    """Trainable fp32 rows for ids >= first_new_id beside a frozen model.

    input_rows (N, H) fp32. output_rows (N, H) fp32 with their own values; or None: the head uses
    input_rows too (tied models). train_output=False leaves the output side at its start.
    offload_input_table moves an untied base input table to the CPU: it is only looked up, and 2,048
    rows a step (20 MiB) cross the bus instead of 1.45 GiB sitting on the card.

    Memory: 4 N H bytes a row set; a dense gradient of the same size for a trained output side;
            input gradients only for rows in use.
    Raises: OverlayError where the head has a bias or is no plain linear layer, or where the probe
            in `install` sees logits that differ from the model's own.
    """

    def __init__(
        self,
        model: nn.Module,
        first_new_id: int,
        input_rows: Tensor,
        output_rows: Tensor | None = None,
        train_output: bool = True,
        offload_input_table: bool = False,
    ):
        super().__init__()
        check_head(model, first_new_id)
        self.model = [model]  # in a list: the overlay owns its rows, not the model
        # Past nn.Module's __setattr__: as submodules they would be saved, moved, trained with us.
        object.__setattr__(self, "embedding", model.get_input_embeddings())
        object.__setattr__(self, "head", model.get_output_embeddings())
        object.__setattr__(self, "body", getattr(model, model.base_model_prefix))
        self.base_rows = dense_weight(self.head)
        self.replaced = model.config.get_text_config().vocab_size
        self.first_new_id = first_new_id
        self.softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self.dtype = self.base_rows.dtype
        device = self.base_rows.device
        tied = self.embedding.weight.data_ptr() == self.head.weight.data_ptr()
        if offload_input_table and not tied:
            self.embedding.to("cpu")
        self.input_rows = nn.Parameter(input_rows.to(device, torch.float32))
        self.output_rows = None
        if output_rows is not None:
            self.output_rows = nn.Parameter(output_rows.to(device, torch.float32), train_output)
        self.train_output = train_output
        self.output_grad = torch.zeros_like(self.logit_rows) if train_output else None
        self.touched = torch.empty(0, dtype=torch.int64, device=device)
        self.input_grad = torch.empty(0, self.input_rows.shape[1], device=device)

    @property
    def logit_rows(self) -> Tensor:
        """(N, H) the rows that make the new logits."""
        return self.input_rows if self.output_rows is None else self.output_rows

    @property
    def vocab_size(self) -> int:
        return self.first_new_id + len(self.input_rows)

    def base_embed(self, input_ids: Tensor) -> Tensor:
        """(...,) ids -> (..., H) base rows on the card; new ids get row 0, which embed replaces."""
        ids = torch.where(input_ids < self.first_new_id, input_ids, 0)
        embeds = self.embedding(ids.to(self.embedding.weight.device)).detach()
        if embeds.device != self.base_rows.device and self.base_rows.is_cuda:
            embeds = embeds.pin_memory()  # so that Python does not wait for the copy
        return embeds.to(self.base_rows.device, self.dtype, non_blocking=True)

    def embed(self, input_ids: Tensor, base_embeds: Tensor | None = None) -> Tensor:
        """Look up input_ids; ids >= first_new_id are new rows, scaled as the model scales.

        Shapes: input_ids (batch, seq) int64; base_embeds: what base_embed gave earlier
                -> (batch, seq, H) compute dtype, differentiable in input_rows
        """
        base_embeds = self.base_embed(input_ids) if base_embeds is None else base_embeds
        input_ids = input_ids.to(base_embeds.device)
        is_new = input_ids >= self.first_new_id
        rows = self.input_rows[torch.where(is_new, input_ids - self.first_new_id, 0)].to(self.dtype)
        return torch.where(is_new[..., None], rows * self.embed_scale(), base_embeds)

    def embed_scale(self) -> Tensor | float:
        """Gemma multiplies its embeddings by sqrt(hidden_size), rounded to the table's dtype."""
        scale = getattr(self.embedding, "embed_scale", 1.0)
        return scale.to(self.base_rows.device, self.dtype) if torch.is_tensor(scale) else scale

    def begin_step(self, input_ids: Tensor) -> None:
        """Clear the gradients; input_ids: all ids of the step, of every process and micro-batch."""
        new_ids = input_ids[input_ids >= self.first_new_id].unique()  # sorted
        self.touched = (new_ids - self.first_new_id).to(self.input_rows.device)
        self.input_grad = self.input_rows.new_zeros(len(new_ids), self.input_rows.shape[1])
        if self.output_grad is not None:
            self.output_grad.zero_()

    def loss(
        self,
        hidden_states: Tensor,
        labels: Tensor,
        scale: float | None = None,
        base_only: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """chunked_cross_entropy over the whole vocabulary, or over the untouched base head alone.

        Shapes: hidden_states (batch, seq, H), labels (batch, seq) -> losses (batch, seq) fp32,
                gradient (batch, seq, H) fp32 or None; output row gradients are added to output_grad
        """
        losses, grad = chunked_cross_entropy(
            hidden_states.flatten(0, -2), labels.flatten().to(hidden_states.device),
            self.base_rows, len(self.base_rows) if base_only else self.first_new_id,
            None if base_only else self.logit_rows.detach(), self.output_grad, scale, self.softcap,
        )  # fmt: skip
        return losses.view(labels.shape), None if grad is None else grad.view(hidden_states.shape)

    def add_input_gradient(self, input_ids: Tensor, grad: Tensor) -> None:
        """Add d(loss)/d(embed(input_ids)), (batch, seq, H), to the rows that were looked up."""
        is_new = input_ids >= self.first_new_id
        place = torch.searchsorted(self.touched, input_ids[is_new] - self.first_new_id)
        rows = grad[is_new].float() * self.embed_scale()
        add_rows_(self.input_grad, place, rows)

    def install(self) -> None:
        """Put the overlay into the model, and prove on a probe that it computes what that does."""
        model = self.model[0]
        model.set_input_embeddings(OverlayEmbedding(self))
        model.set_output_embeddings(OverlayHead(self))
        self.set_vocab_size(self.vocab_size)
        try:
            self.probe()
        except OverlayError:
            self.uninstall()
            raise

    def uninstall(self) -> None:
        """Give the model its own embedding and head back."""
        model = self.model[0]
        model.set_input_embeddings(self.embedding)
        model.set_output_embeddings(self.head)
        self.set_vocab_size(self.replaced)

    def set_vocab_size(self, size: int) -> None:
        """The library's loss reads it from the config; Gemma's from the model."""
        model = self.model[0]
        model.config.get_text_config().vocab_size = size
        if "vocab_size" in model.__dict__:
            model.vocab_size = size

    @torch.no_grad()
    def probe(self) -> None:
        """Compare the model's own logits on base ids with those that training would compute."""
        model = self.model[0]
        ids = torch.linspace(0, self.first_new_id - 1, 8, device=self.base_rows.device).long()[None]
        own = model(input_ids=ids, use_cache=False).logits[..., : self.first_new_id].float()
        hidden = self.body(inputs_embeds=self.embed(ids), use_cache=False).last_hidden_state
        ours = matmul_fp32(hidden[0], self.base_rows[: self.first_new_id].T)
        soft_cap_(ours, self.softcap)
        if not own.isfinite().all():
            raise OverlayError(
                f"{type(model).__name__} gives logits that are not finite in {self.dtype}; use"
                " compute_dtype bfloat16, or float32 on a card without it"
            )
        difference = (own[0] - ours).abs().max().item() / max(own.abs().max().item(), 1e-30)
        if not difference <= (1e-4 if self.dtype == torch.float32 else 2e-2):
            raise OverlayError(
                f"{type(model).__name__} computes logits from its hidden states in a way the"
                f" overlay does not know (relative difference {difference:.2g} on a probe); it"
                " cannot be trained exactly"
            )


def check_head(model: nn.Module, first_new_id: int = 0) -> None:
    """Raise OverlayError, in one line, for a head or embedding that the overlay cannot serve."""
    name, head = type(model).__name__, model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    wanted = "the overlay serves causal language models with one embedding and one linear head"
    if head is None or embedding is None or getattr(model.config, "is_encoder_decoder", False):
        raise OverlayError(f"{name} has no input embedding and output head of one text; {wanted}")
    if not isinstance(head, nn.Linear) or getattr(head, "bias", None) is not None:
        kind = type(head).__name__
        raise OverlayError(f"{name} has a {kind} head with a bias or no weight; {wanted}")
    quantized = getattr(head.weight, "quant_state", None) is not None
    if type(head).forward is not nn.Linear.forward and not quantized:
        raise OverlayError(f"{name} has a {type(head).__name__} as output head; {wanted}")
    # A subclass may scale its rows (Gemma's embed_scale, which `embed` knows), and do nothing else.
    plain = getattr(type(embedding), "forward", None) is nn.Embedding.forward
    known = isinstance(embedding, nn.Embedding) and (plain or hasattr(embedding, "embed_scale"))
    if not known or embedding.max_norm is not None:
        raise OverlayError(f"{name} has a {type(embedding).__name__} as input embedding; {wanted}")
    if not hasattr(getattr(model, model.base_model_prefix, None), "layers"):
        raise OverlayError(
            f"{name} has no such layers; the overlay serves models with their decoder layers in"
            " model.base_model.layers"
        )
    if first_new_id > len(embedding.weight):
        raise OverlayError(
            f"{name} has tables of {len(embedding.weight)} rows, but its tokenizer has"
            f" {first_new_id} tokens; the overlay serves models whose tables hold every token of"
            " their own tokenizer"
        )
