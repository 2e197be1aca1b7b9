"""This file puts trainable rows beside a frozen language model, whose own tables never change.

    overlay = WakeOverlay(model, first_new_id, input_rows, output_rows)  # None: one set for both
    overlay.install()                             # model() and generate() now know the new ids

    optimizer = Optimizer(overlay)
    overlay.begin_step(x)                         # one training step by hand
    losses = forward_backward(overlay, x, y, overlay.base_embed(x), 1 / x.numel(), LossScale())
    norm = optimizer.gradient_norm()
    optimizer.update(step, learning_rate, min(1.0, max_grad_norm / norm))

A model has V base tokens and gets N new ones with the ids V ... V + N - 1. Its embedding table E
and its head table W stay as they are. The new words have input rows R, of shape (N, H), and output
rows S of the same shape; if the model ties its head to its embedding, S is R.

    embedding of id i    E[i]  if i < V,  else R[i - V]
    logits of state h    [ h W^T , h S^T ]                                  V + N numbers

R and S are all that is trained. Some models scale or cap their logits, or add a bias; `HeadFormula`
says how. The loss makes the gradient of S itself. The gradient of R comes from the backward pass
through the body: a row of R gets the sum of the input embeddings' gradients wherever its word
stands. The file has this order: rows and look-up, loss, one micro-batch, Adafactor, what rows
share, first values, and last the models that cannot be served. A 14B step of 2,048 tokens spends 22
of its 286 ms in the loss (one H200, 2026-11-26, docs/measurements.md).
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# If this file is pasted into a notebook below the others, their names are there already.
if "UserError" not in globals():
    from config import UserError, one_line

# The loss holds fp32 logits of 256 positions over the base vocabulary at once: 149 MiB for 152,064
# tokens. Larger chunks were not faster on an H100.
LOSS_CHUNK_POSITIONS = 256
# The loss holds the logits of 2,048 positions over the new words at once: 345 MiB for 44,223 words.
# An evaluation makes no gradient, and holds the logits of 256 positions.
LOSS_GROUP_POSITIONS = 2048
# New rows are fp32 and cast to the compute dtype 4,096 at a time: 40 MiB at a hidden size of 5,120.
ROW_BLOCK = 4096
# float16 loses precision below 6e-5 and holds nothing below 6e-8. A softmax over 195,888 tokens has
# entries near 5e-6. Multiplied by this power of two, such entries keep their precision. The largest
# possible entry, 1, becomes 1,024, far below float16's limit of 65,504.
FLOAT16_SOFTMAX_SCALE = 1024.0
# The loss scale that a float16 run starts with. It is halved at each overflow. After
# every 200 steps without an overflow it is doubled again, up to this value.
FLOAT16_LOSS_SCALE = 65536.0


# ---- Rows and their look-up ----------------------------------------------------------------------


class WakeOverlay(nn.Module):
    """This holds trainable fp32 rows for the ids from first_new_id on, beside a frozen model.

    Shapes: input_rows (N, H); output_rows (N, H), or None if the head shares the input rows.
    train_output=False keeps the output rows as they are. offload_input_table moves an untied input
    table to the host: it is only looked up, so 20 MiB of rows a step cross the bus (2,048 tokens,
    H = 5,120) and 1.45 GiB of the card stay free.

    body is the module that takes embeddings to last hidden states, through its decoder `layers`.
    Models that also take pictures, such as Gemma 3 4B, have such a body for their text inside.

    Memory: 4 N H bytes for each row set, and 4 N H bytes for the one gradient buffer of both sets
    Raises: UserError if the model has an embedding or a head that cannot be served exactly
    """

    def __init__(
        self, model: nn.Module, first_new_id: int, input_rows: Tensor,
        output_rows: Tensor | None = None, train_output: bool = True,
        offload_input_table: bool = False,
    ):  # fmt: skip
        super().__init__()
        body, layers = check_model(model, first_new_id)
        keep_outside(
            self, model=model, embedding=model.get_input_embeddings(),
            head=model.get_output_embeddings(), body=body, layers=layers,
        )  # fmt: skip
        settings = model.config.get_text_config()
        self.base_vocab_size = settings.vocab_size  # put back by uninstall; padding rows included
        self.formulas = head_formulas(model)
        self.formula = self.formulas[0]  # until the probe of `install` has chosen
        self.first_new_id, self.train_output = first_new_id, train_output
        self.base_rows = dense_weight(self.head)  # (at least V, H)
        self.dtype, device = self.base_rows.dtype, self.base_rows.device
        if offload_input_table and not is_tied(model):
            self.embedding.to("cpu")
        self.input_rows = nn.Parameter(input_rows.to(device, torch.float32))  # (N, H)
        self.output_rows = None
        if output_rows is not None:
            self.output_rows = nn.Parameter(output_rows.to(device, torch.float32), train_output)
        # The gradient of the output rows. After their update it takes that of the input rows.
        self.grad = torch.zeros_like(self.input_rows, requires_grad=False)  # (N, H)
        # The gradient of the input rows, only for the words that occur in the step's text.
        self.used = torch.empty(0, dtype=torch.int64, device=device)  # (U,) indices of their rows
        self.input_grad = self.grad.new_empty(0, self.grad.shape[1])  # (U, H)

    @property
    def logit_rows(self) -> Tensor:
        """These rows, of shape (N, H), make the new words' logits."""
        return self.input_rows if self.output_rows is None else self.output_rows

    @property
    def vocab_size(self) -> int:
        return self.first_new_id + len(self.input_rows)

    def spread_ids(self, num: int) -> Tensor:
        """Choose tokens for a trial, (1, num), evenly over the base's and the new ones."""
        ids = torch.linspace(0, self.vocab_size - 1, num).round().long()
        has_row = (ids < len(self.base_rows)) | (ids >= self.first_new_id)
        return torch.where(has_row, ids, 0)[None].to(self.base_rows.device)

    def base_embed(self, input_ids: Tensor) -> Tensor:
        """Look up base tokens; a new word gets row 0, which `embed` replaces.

        Shapes: input_ids (B, T) int64 -> (B, T, H) in the compute dtype, on the head's device,
                without a gradient
        """
        ids = torch.where(input_ids < self.first_new_id, input_ids, 0)
        embeds = self.embedding(ids.to(self.embedding.weight.device)).detach()  # (B, T, H)
        if embeds.device != self.base_rows.device and self.base_rows.is_cuda:
            embeds = embeds.pin_memory()  # from pageable memory Python would wait for the copy
        return embeds.to(self.base_rows.device, self.dtype, non_blocking=True)

    def embed(self, input_ids: Tensor, base_embeds: Tensor | None = None) -> Tensor:
        """Look up base tokens and new words: E[i] if i < V, else R[i - V].

        Shapes: input_ids (B, T) int64; base_embeds (B, T, H) as `base_embed` gave it earlier
                -> (B, T, H) in the compute dtype, differentiable in input_rows
        """
        base_embeds = self.base_embed(input_ids) if base_embeds is None else base_embeds
        input_ids = input_ids.to(base_embeds.device)
        is_new = input_ids >= self.first_new_id
        index = torch.where(is_new, input_ids - self.first_new_id, 0)  # (B, T)
        rows = self.input_rows[index].to(self.dtype)  # (B, T, H)
        return torch.where(is_new[..., None], rows * self.embed_scale(), base_embeds)

    def embed_scale(self) -> Tensor | float:
        """Gemma multiplies embeddings by sqrt(H), rounded to the table's dtype; others by 1."""
        scale = getattr(self.embedding, "embed_scale", 1.0)
        return scale.to(self.base_rows.device, self.dtype) if torch.is_tensor(scale) else scale

    def begin_step(self, input_ids: Tensor) -> None:
        """Clear both gradients; input_ids: the ids of the whole step, from all processes."""
        new_ids = input_ids[input_ids >= self.first_new_id].unique()  # (U,) in ascending order
        self.used = (new_ids - self.first_new_id).to(self.grad.device)
        self.input_grad = self.grad.new_zeros(len(new_ids), self.grad.shape[1])  # (U, H)
        self.grad.zero_()

    def loss(
        self, hidden_states: Tensor, labels: Tensor, scale: float | None = None,
        base_only: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Compute chunked_cross_entropy over base and new words, or over the untouched head alone.

        Shapes: hidden_states (B, T, H), labels (B, T)
                -> losses (B, T) fp32, gradient (B, T, H) fp32, or None without `scale`.
        The output rows' gradient is added to `grad`.
        """
        hidden = hidden_states.flatten(0, -2).to(self.dtype)  # Mamba's are fp32 in any dtype
        losses, grad = chunked_cross_entropy(
            hidden, labels.flatten().to(hidden_states.device),
            self.base_rows, len(self.base_rows) if base_only else self.first_new_id,
            None if base_only else self.logit_rows.detach(),
            self.grad if self.train_output else None, scale, self.formula,
        )  # fmt: skip
        return losses.view(labels.shape), None if grad is None else grad.view(hidden_states.shape)

    def add_input_gradient(self, input_ids: Tensor, grad: Tensor) -> None:
        """Add d(loss)/d(embed(input_ids)), of shape (B, T, H), to the rows that were looked up."""
        is_new = input_ids >= self.first_new_id
        index = torch.searchsorted(self.used, input_ids[is_new] - self.first_new_id)  # (new,)
        rows = grad[is_new].float() * self.embed_scale()  # (new, H)
        add_rows_(self.input_grad, index, rows)

    def install(self) -> None:
        """Put the overlay into the model, and prove that training computes the model's own logits.

        Raises: UserError if the logits differ; the model is then as it was before
        """
        self.model.set_input_embeddings(OverlayEmbedding(self))
        self.model.set_output_embeddings(OverlayHead(self))
        self.set_vocab_size(self.vocab_size)
        try:
            probe(self)
        except UserError:
            self.uninstall()
            raise

    def uninstall(self) -> None:
        """Give the model its own embedding and head back."""
        self.model.set_input_embeddings(self.embedding)
        self.model.set_output_embeddings(self.head)
        self.set_vocab_size(self.base_vocab_size)

    def set_vocab_size(self, size: int) -> None:
        """Set the size that transformers' own loss reads from the config, or in Gemma the model."""
        self.model.config.get_text_config().vocab_size = size
        if "vocab_size" in self.model.__dict__:
            self.model.vocab_size = size


class OverlayEmbedding(nn.Module):
    """This module takes the place of the model's input embedding while the overlay is installed."""

    def __init__(self, overlay: WakeOverlay):
        super().__init__()
        self.rows = overlay.input_rows  # model.device is that of the first parameter, this one
        keep_outside(self, overlay=overlay)

    @property
    def weight(self) -> Tensor:
        """The base table, which Gemma 4 asks for its dtype and for the row of its padding token."""
        return self.overlay.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.overlay.embed(input_ids)


class OverlayHead(nn.Module):
    """This module takes the place of the model's head; it gives logits over base and new tokens."""

    def __init__(self, overlay: WakeOverlay):
        super().__init__()
        self.rows = overlay.logit_rows
        keep_outside(self, overlay=overlay)

    @property
    def weight(self) -> Tensor:
        """The base table, which Mamba and others ask for its dtype."""
        return self.overlay.base_rows

    def forward(self, hidden_states: Tensor) -> Tensor:
        overlay, linear = self.overlay, nn.functional.linear
        base_rows, bias = overlay.base_rows[: overlay.first_new_id], overlay.head.bias
        base = linear(hidden_states, base_rows, bias if bias is None else bias[: len(base_rows)])
        # base: (..., V), or less if the table is shorter than the tokenizer; such ids never come
        num_missing = overlay.first_new_id - len(base_rows)
        missing = base.new_full((*base.shape[:-1], num_missing), -math.inf)
        if hidden_states.shape[:-1].numel() <= 8:
            # While generating, reading fp32 rows once is cheaper than casting all of them.
            new = linear(hidden_states.float(), self.rows).to(base.dtype)  # (..., N)
        else:
            new = linear(hidden_states, self.rows.to(hidden_states.dtype))  # (..., N)
        return torch.cat([base, missing, new], dim=-1)  # (..., V + N)


def keep_outside(module: nn.Module, **parts: nn.Module) -> None:
    """Set attributes without making submodules of them, as nn.Module's own __setattr__ would.

    As submodules the parts of the model would be saved, moved and trained together with the rows.
    """
    for name, part in parts.items():
        object.__setattr__(module, name, part)


def is_tied(model: nn.Module) -> bool:
    """Say whether the head uses the embedding's table."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def dense_weight(module: nn.Module) -> Tensor:
    """Return the (rows, H) weight of an embedding or head; a 4-bit weight is dequantized."""
    weight = module.weight
    if getattr(weight, "quant_state", None) is not None:
        import bitsandbytes.functional

        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    if not weight.dtype.is_floating_point:
        raise UserError(
            f"{type(module).__name__} holds {weight.dtype} weights; the overlay reads float or NF4"
            " tables: load the model with quantization nf4 or none"
        )
    return weight.detach()


def add_rows_(target: Tensor, index: Tensor, rows: Tensor) -> None:
    """Add rows[i] to target[index[i]] for every i, with the same bits each time.

    On a GPU index_add_ adds in any order, but index_put_ sorts the indices first. On a CPU
    index_add_ adds one row after another.
    """
    if target.is_cuda:
        target.index_put_((index,), rows, accumulate=True)
    else:
        target.index_add_(0, index, rows)


# ---- Loss ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadFormula:
    """This says what a model makes of its head's products, with cap(z) = softcap tanh(z / softcap):

        logits = cap(scale (h rows^T + bias))

    Granite and Cohere scale, Gemma 2 caps, Phi-2 and GPT-J add a bias. New words have a bias of 0.
    Shapes: bias (table rows,), or None
    """

    scale: float = 1.0
    softcap: float | None = None
    bias: Tensor | None = None

    def apply_(self, logits: Tensor, on_base: bool = False) -> Tensor | float | None:
        """Turn h rows^T, (..., rows) fp32, into logits in place; return the derivative.

        on_base: the rows are the table's first ones. The result is None if the derivative is 1.
        """
        if on_base and self.bias is not None:
            logits += self.bias[: logits.shape[-1]]
        if self.scale != 1.0:
            logits *= self.scale
        if not self.softcap:
            return self.scale if self.scale != 1.0 else None
        logits.div_(self.softcap).tanh_()
        slope = (1.0 - logits.square()).mul_(self.scale)
        logits.mul_(self.softcap)
        return slope


PLAIN_HEAD = HeadFormula()
# How transformers' configs call the scale; -1: the logits are divided by it. The names prove
# nothing: HyperCLOVAX multiplies by what Granite divides by. So the probe decides.
LOGIT_SCALES = {
    "logit_scale": 1, "logits_scaling": -1, "lm_head_multiplier": 1, "output_multiplier": 1,
}  # fmt: skip
LOGIT_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def head_formulas(model: nn.Module) -> list[HeadFormula]:
    """Read from the config what the model's formula may be; the probe keeps the one that holds."""
    settings = model.config.get_text_config()
    caps = [getattr(settings, name, None) for name in LOGIT_SOFTCAPS]
    scales = []
    for name, sign in LOGIT_SCALES.items():
        if isinstance(value := getattr(settings, name, None), float | int) and value:
            scales += [value**sign, value**-sign]
    bias = model.get_output_embeddings().bias
    bias = None if bias is None else bias.detach()
    cap = next((cap for cap in caps if cap), None)
    return [HeadFormula(scale, cap, bias) for scale in (*scales, 1.0)]


def chunked_cross_entropy(
    hidden_states: Tensor, labels: Tensor, base_rows: Tensor, first_new_id: int,
    new_rows: Tensor | None = None, new_rows_grad: Tensor | None = None, scale: float | None = None,
    formula: HeadFormula = PLAIN_HEAD,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Compute cross entropy over base and new rows without ever holding all logits. It equals

        products = cat([hidden @ base_rows[:first_new_id].T + bias, hidden @ new_rows.T], dim=1)
        logits = cap(scale * products), as `formula` has them
        losses = F.cross_entropy(logits.float(), labels, reduction="none", ignore_index=-100)

    If `scale` is given, the gradient of scale * losses.sum() is returned for hidden_states, and
    added to new_rows_grad. With d = softmax(logits) - onehot(label), cut into base and new part,

        d loss / d hidden    = scale (d_base base_rows + d_new new_rows)
        d loss / d new_rows  = scale d_new^T hidden

    Shapes: hidden_states (T, H) in the compute dtype; labels (T,) int64, negative ones are ignored;
            base_rows (at least first_new_id, H) in the compute dtype; new_rows, new_rows_grad
            (N, H) fp32 -> losses (T,) fp32 in nats, gradient (T, H) fp32 or None
    Memory: 0.6 GiB at T = 2,048, H = 5,120 and 152k + 44k rows; the plain way takes 5.7 GiB
    Source: Liger-Kernel's fused linear cross entropy makes its gradients in the forward pass too.
            Here only the new rows have a gradient. The base head is read twice and never written.
    """
    if new_rows is None:
        new_rows = hidden_states.new_empty(0, hidden_states.shape[1], dtype=torch.float32)
    # A matrix product with 151,665 columns is slow on a GPU, because its rows are not aligned.
    # Padding rows of the table fill the number up to a multiple of 64; their logits become -inf.
    base_rows = base_rows[: -(-first_new_id // 64) * 64]
    losses = torch.empty(len(labels), device=labels.device)  # (T,)
    grad_hidden = None if scale is None else torch.empty_like(hidden_states, dtype=torch.float32)
    for group in blocks(len(labels), LOSS_GROUP_POSITIONS if scale else LOSS_CHUNK_POSITIONS):
        grad = None if scale is None else grad_hidden[group]  # (G, H), a view
        losses[group] = cross_entropy_of_group(
            hidden_states[group], labels[group], base_rows, first_new_id, new_rows, formula,
            grad, new_rows_grad, scale,
        )  # fmt: skip
    return losses, grad_hidden


def cross_entropy_of_group(
    hidden: Tensor, labels: Tensor, base_rows: Tensor, first_new_id: int, new_rows: Tensor,
    formula: HeadFormula, grad_hidden: Tensor | None, new_rows_grad: Tensor | None,
    scale: float | None,
) -> Tensor:  # fmt: skip
    """Compute the losses of G positions, (G,), and their gradients if grad_hidden (G, H) is given.

    The logits of all new rows, (G, N), are held at once, those of the base rows chunk by chunk.
    """
    new_logits = hidden.new_empty(len(hidden), len(new_rows), dtype=torch.float32)  # (G, N)
    for block in blocks(len(new_rows), ROW_BLOCK):
        new_logits[:, block] = matmul_fp32(hidden, new_rows[block].to(hidden.dtype).T)
    losses = torch.empty(len(labels), device=labels.device)  # (G,)
    for chunk in blocks(len(hidden), LOSS_CHUNK_POSITIONS):
        base_logits = matmul_fp32(hidden[chunk], base_rows.T)  # (C, base columns)
        losses[chunk] = cross_entropy_and_grad_(
            base_logits, new_logits[chunk], labels[chunk], first_new_id, formula
        )
        if grad_hidden is not None:
            grad_hidden[chunk] = matmul_fp32(as_operand(base_logits, hidden.dtype), base_rows)
        del base_logits  # before the next chunk makes its own
    if grad_hidden is not None:  # by now new_logits holds the gradient of the new words' logits
        add_gradients_of_new_rows_(new_logits, hidden, new_rows, grad_hidden, new_rows_grad, scale)
    return losses


def add_gradients_of_new_rows_(
    d_new: Tensor, hidden: Tensor, new_rows: Tensor, grad_hidden: Tensor,
    new_rows_grad: Tensor | None, scale: float,
) -> None:  # fmt: skip
    """Complete the gradients of a group of G positions, in place, from d_new (G, N) fp32.

    grad_hidden (G, H) holds d_base base_rows so far and becomes the whole gradient.
    """
    if hidden.dtype == torch.float16:
        scale = scale / FLOAT16_SOFTMAX_SCALE  # as_operand has multiplied by it
    for block in blocks(len(new_rows), ROW_BLOCK):
        d_block = as_operand(d_new[:, block], hidden.dtype)  # (G, block)
        grad_hidden += matmul_fp32(d_block, new_rows[block].to(hidden.dtype))
        if new_rows_grad is not None:
            new_rows_grad[block].add_(matmul_fp32(d_block.T, hidden), alpha=scale)
    grad_hidden *= scale


def cross_entropy_and_grad_(
    base: Tensor, new: Tensor, labels: Tensor, first_new_id: int, formula: HeadFormula = PLAIN_HEAD
) -> Tensor:
    """Return each position's loss, and turn h rows^T into d(loss)/d(h rows^T) in place.

    Shapes: base (C, base columns) and new (C, N), fp32; labels (C,) int64, negative ones give a
            loss and a gradient of zero -> losses (C,) fp32
    """
    slopes = formula.apply_(base, on_base=True), formula.apply_(new)
    base[:, first_new_id:] = -math.inf  # padding rows of the table are no tokens
    position = torch.arange(len(labels), device=labels.device)  # (C,)
    in_base, valid = labels < first_new_id, labels >= 0
    base_label = torch.where(in_base & valid, labels, 0)
    largest, target = base.amax(dim=1), base[position, base_label]  # (C,)
    if new.shape[1]:
        new_label = torch.where(in_base, 0, labels - first_new_id)
        largest = torch.maximum(largest, new.amax(dim=1))
        target = torch.where(in_base, target, new[position, new_label])
    total = base.sub_(largest[:, None]).exp_().sum(dim=1)  # (C,)
    total += new.sub_(largest[:, None]).exp_().sum(dim=1)
    losses = torch.where(valid, largest + total.log() - target, 0.0)
    weight = torch.where(valid, 1.0 / total, 0.0)[:, None]  # (C, 1)
    base.mul_(weight)  # softmax ...
    base[position, base_label] -= (in_base & valid).float()  # ... minus one at the label
    new.mul_(weight)
    if new.shape[1]:
        new[position, new_label] -= (~in_base).float()
    for logits, slope in zip((base, new), slopes):
        if slope is not None:
            logits.mul_(slope)
    return losses


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """Compute a @ b in fp32; on a GPU the tensor cores sum half-precision operands in fp32."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()  # a CPU rounds the result to half precision first


def as_operand(d_logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast d(loss)/d(logits) for a matrix product; for float16 it is scaled up in place first."""
    if dtype == torch.float16:
        d_logits.mul_(FLOAT16_SOFTMAX_SCALE)
    return d_logits.to(dtype)


def blocks(length: int, size: int) -> Iterator[slice]:
    """Cut a range into slices: blocks(5, 2) -> 0:2, 2:4, 4:5."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


# ---- One micro-batch by hand ---------------------------------------------------------------------


@dataclass
class LossScale:
    """In float16, backward runs on gradients times `value`, a power of two; elsewhere it is 1."""

    value: float = 1.0
    good_steps: int = 0

    def overflowed(self) -> None:
        self.value, self.good_steps = self.value / 2, 0

    def agree(self, lowest: float) -> None:
        """Take the lowest value of all processes, because process 0 alone saves it for all."""
        if lowest < self.value:
            self.value, self.good_steps = lowest, 0

    def step_done(self) -> None:
        self.good_steps += 1
        if self.value < FLOAT16_LOSS_SCALE and self.good_steps % 200 == 0:
            self.value *= 2


def forward_backward(
    overlay: WakeOverlay, x: Tensor, y: Tensor, base_embeds: Tensor, scale: float,
    loss_scale: LossScale, after_loss: Callable | None = None,
) -> Tensor:  # fmt: skip
    """Run one micro-batch; the gradients of scale * (sum of losses) are added to the overlay's.

        embeds = embed(x)      hidden = body(embeds)      losses, d_hidden = loss(hidden, y)
        d_embeds = body's backward of d_hidden            R's gradient += d_embeds at the new words

    The body's weights need no gradient, so autograd only carries d_hidden back to d_embeds.
    Shapes: x, y (B, T) int64 on the device; base_embeds (B, T, H) -> losses (B, T) fp32
    If float16 overflows in backward, the loss scale is halved and the body runs again.
    after_loss is called between loss and backward, while a GPU still works on the loss.
    """
    with torch.no_grad():
        inputs_embeds = overlay.embed(x, base_embeds).requires_grad_()  # (B, T, H)
    grad = None
    while True:
        hidden_states = overlay.body(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state
        if grad is None:  # a repetition after an overflow keeps the first loss and its gradient
            losses, grad = overlay.loss(hidden_states.detach(), y, scale)  # (B, T), (B, T, H)
            if after_loss:
                after_loss()
        if inputs_embeds.dtype == torch.float16:
            d_hidden = (grad * loss_scale.value).to(hidden_states.dtype)
        else:
            d_hidden, grad = grad.to(hidden_states.dtype), losses  # frees 40 MiB for backward
        (d_embeds,) = torch.autograd.grad(hidden_states, inputs_embeds, d_hidden)  # (B, T, H)
        finite = d_embeds.dtype != torch.float16 or d_embeds.isfinite().all().item()
        # If the losses are not finite, or the scale is down to 1, no smaller scale can help.
        if finite or loss_scale.value <= 1.0 or not losses.isfinite().all():
            break
        loss_scale.overflowed()
    overlay.add_input_gradient(x, d_embeds.float() / loss_scale.value)
    return losses


# ---- Adafactor -----------------------------------------------------------------------------------


def adafactor_update(
    rows: Tensor, grad: Tensor, mean_squares: dict[str, Tensor], step: int, learning_rate: float,
    grad_scale: float = 1.0,
) -> None:  # fmt: skip
    """Move `rows` by one Adafactor step on g = grad_scale * grad. With d = 1 - step^-0.8,

        r <- d r + (1 - d) (mean of g^2 over each row + 1e-30)            (N,)
        c <- d c + (1 - d) (mean of g^2 over each column + 1e-30)         (H,)
        u  = g / sqrt(r c^T / mean(r))
        rows <- rows - learning_rate u / max(1, root mean square of u)

    It equals transformers' Adafactor(lr, eps=(1e-30, 1e-3), clip_threshold=1.0, decay_rate=-0.8,
    scale_parameter=False, relative_step=False).

    Shapes: rows, grad (N, H) fp32; mean_squares: 'row' (N,), 'column' (H,), updated in place
    Memory: a temporary of 4,096 rows, 80 MiB at H = 5,120; transformers' takes 2 N H values
    Source: Shazeer and Stern, "Adafactor", 2018
    """
    num_rows, hidden_size = rows.shape
    decay = 1.0 - step**-0.8
    # A norm needs no (N, H) temporary; grad.square().mean() would. Shapes: (N,) and (H,).
    row_squares = torch.linalg.vector_norm(grad, dim=1).mul_(grad_scale).square_() / hidden_size
    column_squares = torch.linalg.vector_norm(grad, dim=0).mul_(grad_scale).square_() / num_rows
    row, column = mean_squares["row"], mean_squares["column"]
    row.mul_(decay).add_(row_squares + 1e-30, alpha=1 - decay)
    column.mul_(decay).add_(column_squares + 1e-30, alpha=1 - decay)
    row_factor = (row / row.mean()).rsqrt()  # (N,)
    column_factor = column.rsqrt() * grad_scale  # (H,)
    total = torch.zeros((), device=grad.device)  # the sum of u^2
    for block in blocks(num_rows, ROW_BLOCK):
        norms = torch.linalg.vector_norm(grad[block] * column_factor, dim=1)  # (block,)
        total += norms.mul_(row_factor[block]).square_().sum()
    root_mean_square = (total / (num_rows * hidden_size)).sqrt()
    row_factor = (row_factor * (learning_rate / root_mean_square.clamp(min=1.0)))[:, None]
    for block in blocks(num_rows, ROW_BLOCK):
        rows[block].addcmul_(grad[block] * column_factor, row_factor[block], value=-1)


class Optimizer:
    """This holds Adafactor's statistics for the row sets that train, and updates the rows.

    sharing: the two matrices of sharing_matrices, or None if every row learns from its own
    gradient alone.
    """

    def __init__(self, overlay: WakeOverlay, sharing: tuple[Tensor, Tensor] | None = None):
        self.overlay, self.sharing = overlay, sharing
        # One set of rows may serve both sides; then its gradient is the sum of the two sides'.
        self.shared = overlay.output_rows is None and overlay.train_output
        separate = overlay.output_rows is not None and overlay.train_output
        num_rows, hidden_size = overlay.grad.shape
        self.mean_squares = {
            name: {"row": overlay.grad.new_zeros(num_rows),
                   "column": overlay.grad.new_zeros(hidden_size)}
            for name in ("input_rows", "output_rows")[: 1 + separate]
        }  # fmt: skip

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Return the norm over the gradients of all new rows, (), before rows share gradients.

        If one set of rows serves both sides, this adds the two sides' gradients. So it must be
        called once a step, before `update`.
        """
        overlay = self.overlay
        if self.shared:
            # `used` has each index once, so no order of adding can change the bits.
            overlay.grad.index_add_(0, overlay.used, overlay.input_grad)
            overlay.input_grad.zero_()
        parts = [torch.linalg.vector_norm(g) for g in (overlay.grad, overlay.input_grad)]
        return torch.linalg.vector_norm(torch.stack(parts))

    @torch.no_grad()
    def update(self, step: int, learning_rate: float, grad_scale: float = 1.0) -> None:
        """Move every row set that trains and use the gradients up; call gradient_norm first."""
        overlay = self.overlay
        if "output_rows" in self.mean_squares:
            self.update_rows("output_rows", step, learning_rate, grad_scale)
            overlay.grad.zero_()  # the buffer now takes the input side's gradient
        if not self.shared:
            overlay.grad.index_copy_(0, overlay.used, overlay.input_grad)
        self.update_rows("input_rows", step, learning_rate, grad_scale)

    def update_rows(self, name: str, step: int, learning_rate: float, grad_scale: float) -> None:
        """Let the rows share the gradient in overlay.grad, then move one row set by it."""
        rows, grad = getattr(self.overlay, name).data, self.overlay.grad
        if self.sharing:
            share_gradient_(grad, *self.sharing)
        adafactor_update(rows, grad, self.mean_squares[name], step, learning_rate, grad_scale)

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor that a save holds, by name: the tensors themselves, not copies."""
        found = {"input_rows": self.overlay.input_rows.data}
        if self.overlay.output_rows is not None:
            found["output_rows"] = self.overlay.output_rows.data
        for name, mean_squares in self.mean_squares.items():
            found[f"{name}.row_mean_square"] = mean_squares["row"]
            found[f"{name}.column_mean_square"] = mean_squares["column"]
        return found


# ---- What the rows share -------------------------------------------------------------------------

# Words are kin if they begin or end with the same 2, 3 or 4 letters, or if their first or last base
# token is the same. Single letters made the held-out loss worse. Trigrams inside a word and more of
# its base tokens gained less than 0.1 % (docs/measurements.md).
KIN_LETTERS = (2, 3, 4)
# A feature of only two words teaches almost nothing, and most features are of one or two words.
KIN_MIN_WORDS = 3
# The sums over features are made for 256 columns of the gradient at once. With their results they
# take 0.10 GiB for the 18,284 features of 44,223 words; all 5,120 columns would take 1.2 GiB.
KIN_COLUMNS = 256


def shared_features(word: str, ids: list[int]) -> list[str | int]:
    """List a word's features. Each word has "". The others are beginnings, endings, base tokens.

    "ri " is a beginning and " un" an ending. ids[0] stands for the first base token and ~ids[-1],
    a negative number, for the last one. "=run" is what the two forms of a word share.
    """
    sizes = [size for size in KIN_LETTERS if size <= len(word)]
    beginnings, endings = [word[:n] + " " for n in sizes], [" " + word[-n:] for n in sizes]
    return ["", *beginnings, *endings, ids[0], ~ids[-1], "=" + word]


def sharing_matrices(
    words: list[str], spellings: list[list[int]], row_coupling: float, kin_coupling: float,
    device: torch.device,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Make Phi^T and Phi D for share_gradient_, or None if no word would share anything.

    D is diagonal: k / sqrt(n_f) for a feature f of n_f words, and c / sqrt(N) for the one that all
    words have, where c is row_coupling and k is kin_coupling. The matrices follow from the words
    and the config alone, so a save does not hold them. They take 0.3 s for 44,223 words.
    Shapes: spellings: the base ids of each word -> (F, N), (N, F) fp32, sparse in rows
    """
    numbers, found, lengths = {"": 0}, [], []
    for word, ids in zip(words, spellings):
        features = shared_features(word, ids)
        found += [numbers.setdefault(feature, len(numbers)) for feature in features]
        lengths.append(len(features))
    feature = torch.tensor(found)  # (pairs,): every word with each of its features
    word = torch.arange(len(words)).repeat_interleave(torch.tensor(lengths))  # (pairs,)
    num_words = torch.bincount(feature)  # (all features,)
    weight = kin_coupling / num_words.sqrt()
    of_one_word = torch.tensor([str(name).startswith("=") for name in numbers])
    weight[num_words < torch.where(of_one_word, 2, KIN_MIN_WORDS)] = 0.0
    weight[0] = row_coupling / math.sqrt(len(words))  # the feature that all words share
    kept = weight[feature] > 0
    if not kept.any():
        return None
    word, values = word[kept], weight[feature[kept]]
    feature = feature[kept].unique(return_inverse=True)[1]  # numbered anew: 0 ... F - 1
    shape = int(feature.max()) + 1, len(words)  # (F, N)
    to_features = sparse_rows(feature, word, torch.ones_like(values), shape, device)
    return to_features, sparse_rows(word, feature, values, shape[::-1], device)


def sparse_rows(
    row: Tensor, column: Tensor, values: Tensor, shape: tuple[int, int], device: torch.device
) -> Tensor:
    """Make a sparse CSR matrix; its indices have 32 bits, so that a GPU reads half the bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.13 says at each first use that CSR is beta
        csr = torch.sparse_coo_tensor(torch.stack([row, column]), values, shape).to_sparse_csr()
        indices = csr.crow_indices().int(), csr.col_indices().int()
        return torch.sparse_csr_tensor(*indices, csr.values(), shape, device=device)


def share_gradient_(grad: Tensor, to_features: Tensor, to_words: Tensor) -> None:
    """Let every row learn from the gradients of the words that share something with its own word:

        G <- G + (c / sqrt(N)) 1 1^T G + k Phi diag(1 / sqrt(n_f)) Phi^T G

    in place. c is row_coupling and k is kin_coupling. Phi (N, F) is 1 where a word has a feature,
    and n_f words have feature f. The first sum goes over all N words. From it every row learns how
    often any new word comes and what a new word does to the next one. The second sum goes over the
    words that share a feature. From it a row learns, say, what words with its ending have in
    common. Both sums reach words that the text has once or never.

    Shapes: grad (N, H) fp32; to_features (F, N) and to_words (N, F) of sharing_matrices
    The bits are the same each time on a CPU. On a GPU cuSPARSE adds up in any order.
    """
    for columns in grad.split(KIN_COLUMNS, dim=1):  # (N, columns), a view
        columns += to_words @ (to_features @ columns)


# ---- First values --------------------------------------------------------------------------------


def output_mode(output_rows: str, tied: bool) -> str:
    """Say what the config's output_rows means for a model: shared, separate or frozen."""
    if output_rows == "auto":
        return "shared" if tied else "separate"
    return output_rows


def starting_rows(table: Tensor, spellings: list[list[int]], config) -> Tensor:
    """Make the rows of one side at step 0, as the config's `init` asks.

    Shapes: table (V, H) without padding rows -> (len(spellings), H) fp32 on the table's device
    """
    if config.init == "subtoken_mean":
        return subtoken_mean(table, spellings)
    # Both sides get the same seed, because they were one table in the original runs.
    return spherical_rows(table, len(spellings), config.init_radius, config.seed)


def subtoken_mean(table: Tensor, spellings: list[list[int]]) -> Tensor:
    """Take the mean of the rows of the tokens that spelled each word; one token is copied exactly.

    Shapes: table (V, H) of any float dtype; spellings: the base ids of each word
            -> (len(spellings), H) fp32 on the table's device
    Memory: the gathered rows of ROW_BLOCK words in fp32
    Source: Hewitt, "Initializing new word embeddings", takes the mean of all rows. The mean of a
            word's own pieces keeps words apart (docs/measurements.md).
    """
    device = table.device
    rows = torch.empty(len(spellings), table.shape[1], device=device)  # (N, H)
    for block in blocks(len(spellings), ROW_BLOCK):
        words = spellings[block]
        lengths = torch.tensor([len(ids) for ids in words], device=device)  # (words,)
        pieces = table[torch.tensor([i for ids in words for i in ids], device=device)].float()
        # pieces: (pieces, H); word: (pieces,), the word of each piece
        word = torch.repeat_interleave(torch.arange(len(words), device=device), lengths)
        sums = torch.zeros(len(words), table.shape[1], device=device)  # (words, H)
        add_rows_(sums, word, pieces)
        rows[block] = sums / lengths[:, None]
    return rows


def spherical_rows(table: Tensor, num_rows: int, radius: float, seed: int) -> Tensor:
    """Draw random directions of norm radius x std(table) x sqrt(H), as the original runs did.

    Shapes: table (V, H) -> (num_rows, H) fp32 on the table's device. The numbers are drawn on the
    CPU, so that a seed means the same rows on every machine.
    """
    count, total, squares = table.numel(), 0.0, 0.0
    for block in table.split(ROW_BLOCK):  # all of a 152,064 x 5,120 table in fp32 would be 2.9 GiB
        total += block.double().sum().item()
        squares += block.double().square().sum().item()
    std = math.sqrt((squares - total * total / count) / (count - 1))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, table.shape[1], generator=generator)
    rows *= radius * std * math.sqrt(table.shape[1]) / rows.norm(dim=1, keepdim=True)
    return rows.to(table.device)


# ---- Models that cannot be served ----------------------------------------------------------------


WANTED = "the overlay serves causal language models with one embedding and one linear head"


def check_model(model: nn.Module, first_new_id: int = 0) -> tuple[nn.Module, nn.ModuleList]:
    """Raise a UserError of one line if the model's head or embedding cannot be served exactly.

    Returns the body and its decoder layers. A model without weights, on the meta device, will do.
    """
    name, head = type(model).__name__, model.get_output_embeddings()
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # transformers 5 finds none in a picture model of formulas
        embedding = None
    if head is None or embedding is None or getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"{name} has no input embedding and output head of one text; {WANTED}")
    quantized = getattr(getattr(head, "weight", None), "quant_state", None) is not None
    plain = getattr(type(head), "forward", None) is nn.Linear.forward
    if not isinstance(head, nn.Linear) or not (plain or quantized):
        raise UserError(f"{name} has a {type(head).__name__} as output head; {WANTED}")
    # A subclass may scale its rows (`embed` knows Gemma's embed_scale) and do nothing else.
    plain = getattr(type(embedding), "forward", None) is nn.Embedding.forward
    known = isinstance(embedding, nn.Embedding) and (plain or hasattr(embedding, "embed_scale"))
    if not known or embedding.max_norm is not None:
        raise UserError(f"{name} has a {type(embedding).__name__} as input embedding; {WANTED}")
    body, layers = find_body(model)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    for path, module in body.named_modules():
        num_rows = getattr(module, "num_embeddings", 0)
        # GPT-2 and OPT have a table of positions, OPT's with two rows more. Gemma 3n's second table
        # is a little shorter than its first.
        if module is not embedding and num_rows > max(first_new_id / 2, positions + 2):
            raise UserError(
                f"{name} looks its tokens up in a second table, {path}, which has no rows for new"
                f" words; {WANTED}"
            )
    return body, layers


def check_ids(model: nn.Module, first_new_id: int, ids: Tensor) -> None:
    """Raise a UserError if a text holds a base token that the model's table has no row for.

    Gemma 3 1B has 262,144 rows, and a tokenizer with one token more, which stands for a picture.
    """
    num_rows = len(model.get_input_embeddings().weight)
    if (without := ids[(ids >= num_rows) & (ids < first_new_id)]).numel():
        raise UserError(
            f"corpus: it holds the token {without[0].item()}, for which {type(model).__name__} has"
            f" no row: its tables have {num_rows:,} rows, its tokenizer {first_new_id:,} tokens;"
            " take that token out of the texts"
        )


def find_body(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """Find the module that holds the input embedding and a list of layers, and this list.

    It is model.model of most, model.transformer of GPT-2, model.model.decoder of OPT, and
    model.model.language_model of Gemma 3 4B. Raises: UserError
    """
    embedding = model.get_input_embeddings()
    for body in model.modules():
        lists = [part for part in body.children() if isinstance(part, nn.ModuleList)]
        if lists and any(part is embedding for part in body.modules()):
            return body, max(lists, key=len)
    raise UserError(
        f"{type(model).__name__} has no list of decoder layers beside its embedding; {WANTED}"
    )


@contextlib.contextmanager
def model_errors_in_one_line(what: str, advice: str, *passed_on: type) -> Iterator[None]:
    """Turn whatever a model's own code raises into a UserError; a full GPU and the types of
    `passed_on` are raised as they are."""
    try:
        yield
    except (torch.OutOfMemoryError, *passed_on):
        raise
    except Exception as error:  # a model's own code may raise anything
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{what} ({reason}); {advice}") from error


def probe(overlay: WakeOverlay) -> None:
    """Compare the model's own logits with those that training will compute, on eight tokens.

    The tokens lie evenly over base tokens and new words. A formula of the head is kept if it gives
    the model's logits. A backward pass proves that no position sees a later one. A pass of another
    size comes first, because evaluations and retries change it: the recurrent Gemma of transformers
    4.57.6 keeps a state of the last batch's size and fails in another one. Its numbers are not
    compared, because kernels for another size round otherwise (0.05 through 48 layers in bfloat16).
    Raises: UserError if the logits differ, because the model then does more with its hidden states
            than this file knows; UserError with the library's own words if a pass fails
    """
    model = overlay.model
    name, ids = type(model).__name__, overlay.spread_ids(8)  # (1, 8)
    with model_errors_in_one_line(f"{name} fails in a pass over eight tokens", WANTED):
        with torch.no_grad():
            two = overlay.embed(torch.cat([ids, ids.flip(1)]))  # (2, 8, H)
            overlay.body(inputs_embeds=two, use_cache=False)
            own = model(input_ids=ids, use_cache=False).logits[0].float()  # (8, V + N)
        with torch.enable_grad():
            embeds = overlay.embed(ids).detach().requires_grad_()  # (1, 8, H)
            hidden = overlay.body(inputs_embeds=embeds, use_cache=False).last_hidden_state
            (reach,) = torch.autograd.grad(hidden[0, 3, ::2].mean(), embeds)  # (1, 8, H)
    choose_formula(overlay, own, hidden[0].detach().to(overlay.dtype))
    if reach[0, 4:].nan_to_num(0.0).any():  # NaN: float16 overflowed, which training repeats
        raise UserError(
            f"{name} lets a token see those that follow it; the overlay serves causal language"
            " models"
        )


def choose_formula(overlay: WakeOverlay, own: Tensor, hidden: Tensor) -> None:
    """Keep the formula that turns hidden (8, H) into the model's own logits (8, V + N).

    Raises: UserError if none does, or if the model's own logits are not finite
    """
    name, size = type(overlay.model).__name__, overlay.vocab_size
    if own.shape[-1] != size:
        raise UserError(f"{name} gives {own.shape[-1]:,} logits for {size:,} tokens; {WANTED}")
    base_rows = overlay.base_rows[: overlay.first_new_id]
    own = own[:, : len(base_rows)], own[:, overlay.first_new_id :]  # (8, V), (8, N)
    if not all(part.isfinite().all() for part in own):
        raise UserError(
            f"{name} gives logits that are not finite in {overlay.dtype}; use compute_dtype"
            " bfloat16, or float32 on a card without it"
        )

    def difference(formula: HeadFormula) -> float:
        ours = matmul_fp32(hidden, base_rows.T), hidden.float() @ overlay.logit_rows.T
        formula.apply_(ours[0], on_base=True)
        formula.apply_(ours[1])
        largest = torch.stack([part.abs().max() for part in own]).max().clamp(min=1e-30)
        return max(((a - b).abs().max() / largest).item() for a, b in zip(own, ours))

    overlay.formula = min(overlay.formulas, key=difference)
    least = difference(overlay.formula)
    if not least <= (1e-4 if overlay.dtype == torch.float32 else 2e-2):
        raise UserError(
            f"{name} computes logits from its hidden states in a way the overlay does not know"
            f" (relative difference {least:.2g} on a probe); it cannot be trained exactly"
        )


if __name__ == "__main__" and "__file__" in globals():
    print(__doc__)
