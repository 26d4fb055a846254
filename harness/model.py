"""A model: shapes only, under the names of its symbols here and of its public configuration (``config.json``)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from harness.spec import Count, Named

#: gates in which each expert takes a fixed number of a rank's tokens, or of mixtures of them
EXPERTS_CHOOSE = ("expert_choice", "softmoe")
GEMMS: dict[str, int] = {"gpt": 2, "swiglu": 3}  # of one expert, by Model.ffn_type


class Model(Named):
    """Shapes only. ``E`` experts of FFN size ``H`` over hidden size ``M``, each token to ``k`` of them."""

    num_layers: Count  # all of them
    hidden: Count  # M
    ffn: Count  # H, of one expert
    num_experts: Count  # E
    top_k: Count  # k
    num_heads: Count = 8
    num_kv_heads: Count | None = None  # None: as many as num_heads
    seq: Count = 1024  # L, tokens of one sample
    vocab: Count = 32000
    ffn_type: Literal["gpt", "swiglu"] = "gpt"  # gpt: 2 GEMMs with GELU; swiglu: 3 GEMMs
    gate: Literal["gshard", "softmax_topk", "sigmoid", "xmoe", "moge", "expert_choice", "softmoe"] = "gshard"
    gate_noise: bool = False  # GShard's trainable noise on the gshard gate's logits
    gate_dim: Count | None = None  # d of the xmoe gate's projection; None: E / 2, as X-MoE has it
    normalise_weights: bool = True  # of the sigmoid gate; False: each is its own sigmoid (BASE, StableMoE)
    selection_bias: bool = True  # the sigmoid gate selects by score + bias (DeepSeek-V3)
    num_groups: Count = 1  # expert groups: of the sigmoid gate's limit (DeepSeek-V3); of moge, k / num_groups from each
    topk_groups: Count | None = None  # groups a token may use under the sigmoid gate; None: all
    routed_scale: float = 1.0  # factor on the sigmoid gate's weights (DeepSeek-V3)
    num_shared_experts: Annotated[int, Field(ge=0)] = 0  # every token's, beside its k
    capacity_factor: Annotated[float, Field(gt=0)] | None = None  # None: nothing is dropped
    shared_ffn: Count | None = None  # of all shared experts together; None: num_shared_experts H
    num_dense_layers: Annotated[int, Field(ge=0)] = 0  # the first ones, with an FFN in place of experts
    moe_every: Count = 1  # behind these, one layer of so many has experts, the last of them
    dense_ffn: Count | None = None  # of a layer without experts
    head_dim: Count | None = None  # None: M / num_heads; of latent attention the part without positions
    attention_window: Count | None = None  # tokens that one attends to, its own among them; None: all before it
    window_every: Count = 1  # one layer of so many has the window, the first of them
    q_lora_rank: Count | None = None  # latent attention (DeepSeek-V2): ranks of queries, None: whole
    kv_lora_rank: Count | None = None  # ... and of keys and values; None: attention is not latent
    qk_rope_head_dim: Count | None = None  # ... the part of its heads with positions, whose keys all heads share
    v_head_dim: Count | None = None  # ... of a head's values; None: head_dim
    source: str = ""  # where the numbers come from
    interpretation: str = ""  # what the source leaves open and what was chosen

    LATER: ClassVar[tuple[str, ...]] = (
        *Named.LATER, "shared_ffn", "num_dense_layers", "moe_every", "dense_ffn", "head_dim", "attention_window",
        "window_every", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "v_head_dim",
    )  # fmt: skip

    @model_validator(mode="after")
    def _consistent(self) -> Model:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k = {self.top_k} is larger than num_experts = {self.num_experts}; lower top_k")
        if self.num_experts % self.num_groups:
            raise ValueError(f"num_groups = {self.num_groups} does not divide num_experts = {self.num_experts}")
        if self.topk_groups is not None:
            if self.topk_groups > self.num_groups:
                raise ValueError(f"topk_groups = {self.topk_groups} is larger than num_groups = {self.num_groups}")
            if self.top_k > self.topk_groups * (self.num_experts // self.num_groups):
                raise ValueError(f"top_k = {self.top_k} does not fit into topk_groups = {self.topk_groups} groups")
        if self.gate == "moge":
            if self.num_groups == 1:
                raise ValueError("gate = moge takes as many experts from each of num_groups groups; give 2 or more")
            if self.top_k % self.num_groups:
                raise ValueError(
                    f"num_groups = {self.num_groups} does not divide top_k = {self.top_k}, of which gate = moge takes "
                    "as many from each group; change one of the two"
                )
            if self.topk_groups is not None:
                raise ValueError("topk_groups belongs to gate = sigmoid; gate = moge uses all groups")
        kv = self.num_kv_heads or self.num_heads
        if self.num_heads % kv:
            raise ValueError(f"num_kv_heads = {kv} does not divide num_heads = {self.num_heads}")
        for field, value, gate in (
            ("gate_noise", self.gate_noise, "gshard"),
            ("gate_dim", self.gate_dim is not None, "xmoe"),
            ("normalise_weights = False", not self.normalise_weights, "sigmoid"),
            ("selection_bias = False", not self.selection_bias, "sigmoid"),
        ):
            if value and self.gate != gate:
                raise ValueError(f"{field} belongs to gate = {gate}, not to gate = {self.gate}")
        return self

    @model_validator(mode="after")
    def _layers_and_attention(self) -> Model:
        behind = self.num_layers - self.num_dense_layers
        if behind < 1 or behind % self.moe_every:
            raise ValueError(
                f"num_layers = {self.num_layers} must be num_dense_layers = {self.num_dense_layers} and a multiple of "
                f"moe_every = {self.moe_every}, so that the last layer has experts"
            )
        dense = self.num_layers > self.num_moe_layers
        for field, needs, there in (
            ("dense_ffn", "num_dense_layers or moe_every", dense),
            ("shared_ffn", "num_shared_experts", self.num_shared_experts > 0),
            *((field, "kv_lora_rank", self.is_latent) for field in ("q_lora_rank", "qk_rope_head_dim", "v_head_dim")),
        ):
            if getattr(self, field) is not None and not there:
                raise ValueError(f"{field} = {getattr(self, field)} belongs to {needs}; give that too")
        if dense and self.dense_ffn is None:
            raise ValueError("dense_ffn is missing: the FFN size of the layers without experts")
        if self.window_every > 1 and self.attention_window is None:
            raise ValueError(f"window_every = {self.window_every} belongs to attention_window; give that too")
        if self.is_latent and self.qk_rope_head_dim is None:
            raise ValueError("qk_rope_head_dim is missing: the part of latent attention's heads with positions")
        if self.is_latent and self.num_kv_heads not in (None, self.num_heads):
            raise ValueError(
                f"num_kv_heads = {self.num_kv_heads}: every head of latent attention has its own; leave it"
            )
        return self

    @property
    def num_moe_layers(self) -> int:
        """Layers that have experts."""
        return (self.num_layers - self.num_dense_layers) // self.moe_every

    @property
    def layers_of(self) -> list[range]:
        """Of each layer with experts, it and the dense ones before it, among all layers."""
        ends = range(self.num_dense_layers + self.moe_every, self.num_layers + 1, self.moe_every)
        return [range(end - self.moe_every if i else 0, end) for i, end in enumerate(ends)]

    @property
    def moe_layers(self) -> list[int]:
        """Those that have experts, among all layers."""
        return [blocks[-1] for blocks in self.layers_of]

    @property
    def shared_size(self) -> int:
        """FFN size of all shared experts together; 0: there are none."""
        return self.shared_ffn or self.num_shared_experts * self.ffn

    @property
    def head(self) -> int:
        """Size of a head."""
        return self.head_dim or self.hidden // self.num_heads

    @property
    def is_latent(self) -> bool:
        """Whether keys and values of its attention come from one small vector of each token (DeepSeek-V2)."""
        return self.kv_lora_rank is not None

    @property
    def projection_dim(self) -> int:
        """d of the xmoe gate."""
        return self.gate_dim or max(1, self.num_experts // 2)

    @property
    def normalises(self) -> bool:
        """Whether the gate scales the weights of a token's experts to a fixed sum, where it has several."""
        return self.normalise_weights and self.gate != "moge"

    @property
    def lacks(self) -> str | None:
        """What its attention is priced with and cannot run, in words; None if nothing."""
        fields: tuple[str, ...]
        if self.is_latent:
            what, fields = "latent attention", ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "v_head_dim")
        elif (self.attention_window or self.seq) < self.seq:
            what, fields = f"an attention window of {self.attention_window}", ("attention_window", "window_every")
        else:
            return None
        plain = {field: type(self).model_fields[field].default for field in fields}
        set_here = {field: value for field, value in plain.items() if getattr(self, field) != value}
        changes = ", ".join(f"{field}: {value or 'null'}" for field, value in set_here.items())
        return (
            f"{self.name} has {what}, which is priced and not run; for attention over all tokens, head by head, give "
            f"{changes} and another name, or --scale-down"
        )

    @property
    def takes_routing(self) -> bool:
        """Whether inputs exist that make the gate choose any prescribed k experts per token."""
        if self.gate == "xmoe":
            return self.projection_dim >= self.num_experts
        return self.gate not in EXPERTS_CHOOSE and not self.gate_noise

    def shrunk(self, num_moe_layers: int, ffn: int = 32, **more: Any) -> Model:
        """The same experts, gate, FFN type and order of layers in small: ``num_moe_layers`` with experts, behind one
        dense layer where it has any; plain multi-head attention; a hidden size at which any routing can be prescribed.
        """
        num_dense, hidden = min(1, self.num_dense_layers), max(32, -(-self.num_experts * 3 // 2 // 16) * 16)
        sizes = {
            "num_layers": num_dense + num_moe_layers * self.moe_every,
            "num_dense_layers": num_dense,
            "hidden": hidden,
            "ffn": ffn,
            "dense_ffn": None if self.dense_ffn is None else 2 * ffn,
        }
        plain = ("shared_ffn", "head_dim", "attention_window", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim")
        return self.model_copy(
            update={**dict.fromkeys((*plain, "v_head_dim", "num_kv_heads"), None), "window_every": 1, **sizes, **more}
        )

    def scaled_down(self) -> Model:
        """One that two cores can train and serve: as ``shrunk``, of at most 64 experts."""
        few = 64 if self.num_experts > 64 and 64 % self.num_groups == 0 else self.num_experts
        said = f"{self.name} scaled down: its gate and order of layers; attention over all tokens, head by head."
        of_gpt: dict[str, Any] = {"num_heads": 4, "seq": 64, "vocab": 256}
        fewer = self.model_copy(update={"num_experts": few})
        return fewer.shrunk(2, name=f"{self.name[:74]}-small", interpretation=said, **of_gpt)


__all__ = ["EXPERTS_CHOOSE", "GEMMS", "Model"]
