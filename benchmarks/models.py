"""One training step of each model family at a real width, sparse against dense.

Models of transformers and timm, built from configurations with random weights, two layers each, compiled by
torch.compile, dense and with backend="sparse24" from the same weights: forward, backward, fused AdamW and everything
sparse24 does; weights, gradients and AdamW's state are bf16. They run in turns in one process after warm-up. The loss
difference is that of the first step, before any update: |sparse - dense| / dense.

A family that fails is recorded with its error. The file is written after each one.
"""

import gc
import os
import time
import traceback
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from common import Rows, environment, parser, percentiles  # noqa: E402
from torch import Tensor, nn  # noqa: E402

LAYERS, VOCAB = 2, 8192
Inputs = dict[str, Any]

DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
    "max_position_embeddings": 1024,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
VISION = {
    **{k: v for k, v in ENCODER.items() if k not in ("vocab_size", "max_position_embeddings")},
    "image_size": 224,
    "patch_size": 14,
    "num_labels": 1000,
}
SEQ2SEQ = {
    "vocab_size": VOCAB,
    "d_model": 1024,
    "encoder_ffn_dim": 4096,
    "decoder_ffn_dim": 4096,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 16,
    "decoder_attention_heads": 16,
    "max_position_embeddings": 1024,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": None,
}
T5 = {
    "vocab_size": VOCAB,
    "d_model": 1024,
    "d_kv": 64,
    "d_ff": 4096,
    "num_layers": LAYERS,
    "num_heads": 16,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
#: What --tiny makes of the sizes above, to try the script where there is no GPU.
TINY = {2048: 128, 8192: 256, 4096: 256, 1024: 128, 224: 28, 1536: 192, 8: 2, 16: 2, 24: 2}


class Sizes:
    """Batch and tokens of a step, and the true or the tiny widths."""

    def __init__(self, tokens: int, tiny: bool) -> None:
        self.tiny, self.length = tiny, 32 if tiny else 1024
        self.batch = 2 if tiny else max(1, tokens // self.length)
        self.images = 2 if tiny else max(1, tokens // 256)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def of(self, config: dict[str, Any]) -> dict[str, Any]:
        return {k: TINY.get(v, v) if self.tiny and type(v) is int else v for k, v in config.items()}

    def ids(self, length: int | None = None) -> Tensor:
        top = 256 if self.tiny else VOCAB
        return torch.randint(3, top, (self.batch, length or self.length), device=self.device)

    def pixels(self, size: int) -> Tensor:
        return torch.randn(self.images, 3, size, size, device=self.device, dtype=torch.bfloat16)


Make = Callable[[Sizes], tuple[Callable[[], nn.Module], Inputs]]


def hf(cls: str, inputs: Callable[[Sizes], Inputs], **config: Any) -> Make:
    def make(sizes: Sizes) -> tuple[Callable[[], nn.Module], Inputs]:
        import transformers

        model = getattr(transformers, cls)
        return lambda: model(model.config_class(**sizes.of(config))), inputs(sizes)

    return make


def causal(sizes: Sizes) -> Inputs:
    ids = sizes.ids()
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def masked(sizes: Sizes) -> Inputs:
    return {"input_ids": sizes.ids(sizes.length // 2), "labels": sizes.ids(sizes.length // 2)}


def seq2seq(sizes: Sizes) -> Inputs:
    return {"input_ids": sizes.ids(sizes.length // 2), "labels": sizes.ids(sizes.length // 2), "use_cache": False}


def image(sizes: Sizes) -> Inputs:
    labels = torch.zeros(sizes.images, dtype=torch.long, device=sizes.device)
    return {"pixel_values": sizes.pixels(28 if sizes.tiny else 224), "labels": labels}


def timm(name: str, **options: Any) -> Make:
    def make(sizes: Sizes) -> tuple[Callable[[], nn.Module], Inputs]:
        import timm

        size = 28 if sizes.tiny else 224
        return lambda: timm.create_model(name, img_size=size, **sizes.of(options)), {"x": sizes.pixels(size)}

    return make


def torch_transformer(sizes: Sizes) -> tuple[Callable[[], nn.Module], Inputs]:
    width, heads = (128, 2) if sizes.tiny else (1024, 16)
    x = torch.randn(sizes.batch, sizes.length // 2, width, device=sizes.device, dtype=torch.bfloat16)
    options = {"dropout": 0.0, "batch_first": True}
    return lambda: nn.Transformer(width, heads, LAYERS, LAYERS, 4 * width, **options), {"src": x, "tgt": x}


def whisper(sizes: Sizes) -> tuple[Callable[[], nn.Module], Inputs]:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    frames = 64 if sizes.tiny else 1536
    config = WhisperConfig(**{**sizes.of(SEQ2SEQ), "max_source_positions": frames, "num_mel_bins": 80})
    x = torch.randn(sizes.batch, 80, 2 * frames, device=sizes.device, dtype=torch.bfloat16)
    return lambda: WhisperEncoder(config), {"input_features": x}


NO_GROUPS = {k: v for k, v in DECODER.items() if k != "num_key_value_heads"}
MODELS: dict[str, Make] = {
    "gpt2": hf("GPT2LMHeadModel", causal, vocab_size=VOCAB, n_positions=1024, n_embd=1024, n_layer=LAYERS, n_head=16,
               n_inner=4096, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2),
    "bert": hf("BertForMaskedLM", masked, **ENCODER),
    "roberta": hf("RobertaForMaskedLM", masked, **ENCODER),
    "marian": hf("MarianMTModel", seq2seq, **SEQ2SEQ),
    "bart": hf("BartForConditionalGeneration", seq2seq, **SEQ2SEQ),
    "nn.transformer": torch_transformer,
    "t5": hf("T5ForConditionalGeneration", seq2seq, **T5),
    "flan-t5": hf("T5ForConditionalGeneration", seq2seq, **T5, feed_forward_proj="gated-gelu",
                  tie_word_embeddings=False),
    "llama": hf("LlamaForCausalLM", causal, **DECODER),
    "mistral": hf("MistralForCausalLM", causal, **DECODER),
    "qwen3": hf("Qwen3ForCausalLM", causal, **DECODER, head_dim=128),
    "gemma": hf("GemmaForCausalLM", causal, **DECODER, head_dim=128),
    "phi-2": hf("PhiForCausalLM", causal, **DECODER),
    "phi-3": hf("Phi3ForCausalLM", causal, **DECODER),
    "opt": hf("OPTForCausalLM", causal, vocab_size=VOCAB, hidden_size=2048, ffn_dim=8192, num_hidden_layers=LAYERS,
              num_attention_heads=16, max_position_embeddings=4096, dropout=0.0, word_embed_proj_dim=2048,
              pad_token_id=0),
    "modernbert": hf("ModernBertForMaskedLM", masked, **{k: v for k, v in ENCODER.items() if "prob" not in k},
                     pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2),
    "qwen3-moe": hf("Qwen3MoeForCausalLM", causal, **DECODER, head_dim=128, moe_intermediate_size=1024, num_experts=8,
                    num_experts_per_tok=2, mlp_only_layers=[1]),
    "vit": hf("ViTForImageClassification", image, **VISION),
    "deit": hf("DeiTForImageClassification", image, **VISION),
    "swin": hf("SwinForImageClassification", image, image_size=224, patch_size=14, embed_dim=1024, depths=[2],
               num_heads=[16], window_size=8, mlp_ratio=4.0, drop_path_rate=0.0, num_labels=1000),
    "dinov2": hf("Dinov2ForImageClassification", image,
                 **{k: v for k, v in VISION.items() if k not in ("intermediate_size", "hidden_size")}, hidden_size=1536,
                 use_swiglu_ffn=True, mlp_ratio=4),
    "whisper": whisper,
    "vit-timm": timm("vit_large_patch14_224", depth=LAYERS, embed_dim=1024, num_heads=16),
    "deit-timm": timm("deit3_large_patch16_224", depth=LAYERS, embed_dim=1024, num_heads=16, patch_size=14),
    "swin-timm": timm("swin_base_patch4_window7_224", depths=(2,), embed_dim=1024, num_heads=(16,), patch_size=14,
                      window_size=8, drop_path_rate=0.0),
    "dinov2-timm": timm("vit_giant_patch14_dinov2", depth=LAYERS, embed_dim=1536, num_heads=24),
}  # fmt: skip


def loss_of(output: Any) -> Tensor:
    loss = getattr(output, "loss", None)
    if loss is not None:
        return loss
    first = output if isinstance(output, Tensor) else output[0]
    return first.float().square().mean()


class Run:
    """One model, its optimizer and its compiled form."""

    def __init__(self, build: Callable[[], nn.Module], inputs: Inputs, device: str, **compile_options: Any) -> None:
        torch.manual_seed(0)
        self.model = build().to(device, torch.bfloat16).train()
        self.inputs = inputs
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.compiled = torch.compile(self.model, **compile_options)

    def step(self) -> Tensor:
        loss = loss_of(self.compiled(**self.inputs))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(run: Run, n: int) -> float:
    """ms a step, over n steps."""
    synchronize()
    start = time.perf_counter()
    for _ in range(n):
        run.step()
    synchronize()
    return (time.perf_counter() - start) / n * 1e3


def compare(name: str, sizes: Sizes, options: dict[str, Any], turns: int, steps: int) -> dict[str, Any]:
    import sparse24

    torch._dynamo.reset()
    began = time.perf_counter()
    build, inputs = MODELS[name](sizes)
    inner = options.get("inner", "inductor")
    dense = Run(build, inputs, sizes.device, backend=inner)
    sparse = Run(build, inputs, sizes.device, backend="sparse24", options=options)
    first = {"dense": dense.step().item(), "sparse": sparse.step().item()}
    session = sparse24.session(sparse.model)
    compiled_s = time.perf_counter() - began
    for run in (dense, sparse):
        timed(run, 3)
    while session.step % 40 and not sizes.tiny:  # the timed steps then hold one search of the masks
        sparse.step()
    times: dict[str, list[float]] = {"dense": [], "sparse": []}
    for _ in range(turns):
        for key, run in (("dense", dense), ("sparse", sparse)):
            times[key].append(timed(run, steps))
    mean = {key: sum(values) / len(values) for key, values in times.items()}
    weights = session.weights
    reasons: dict[str, int] = {}
    for weight in weights.values():
        if weight.reason_skipped:
            reasons[weight.reason_skipped] = reasons.get(weight.reason_skipped, 0) + 1
    return {
        "model": name,
        "class": type(dense.model).__name__,
        "parameters": sum(p.numel() for p in dense.model.parameters()),
        "inputs": {k: list(v.shape) for k, v in inputs.items() if isinstance(v, Tensor)},
        "dense_ms": mean["dense"],
        "sparse_ms": mean["sparse"],
        "ratio": mean["dense"] / mean["sparse"],
        "slower": min(times["sparse"]) > max(times["dense"]),  # by more than turns of one model differ
        "percentiles": {key: percentiles(values) for key, values in times.items()},
        "first_loss": first,
        "relative_loss_difference": abs(first["sparse"] - first["dense"]) / abs(first["dense"]),
        "sparse_weights": sum(weight.reason_skipped is None for weight in weights.values()),
        "dense_reasons": reasons,
        "compile_s": compiled_s,
        "wall_s": time.perf_counter() - began,
    }


def main() -> None:
    p = parser(__doc__, "models.json", resumable=True)
    p.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), help="which families")
    p.add_argument("--tokens", type=int, default=32768, help="tokens (or patches) a step")
    p.add_argument("--turns", type=int, default=4, help="how often the two models run in turns")
    p.add_argument("--steps", type=int, default=10, help="steps in a turn")
    p.add_argument("--layers", default="ffn", choices=["ffn", "all"], help="which linears are sparse")
    p.add_argument("--when", default="faster", choices=["faster", "always"], help="the recipe's option")
    p.add_argument(
        "--inner", default="inductor", choices=["inductor", "aot_eager", "eager"], help="the compiler behind"
    )
    p.add_argument("--seconds", type=float, default=float("inf"), help="start no family after so many seconds")
    p.add_argument("--tiny", action="store_true", help="small sizes, to try the script on a CPU")
    args = p.parse_args()
    options = {"layers": args.layers, "when": args.when, "inner": args.inner}
    rows = Rows(args.out, ("model",), args.resume, tokens=args.tokens, **options)
    print(environment())
    print(
        f"{'model':16s} {'dense ms':>9s} {'sparse ms':>9s} {'ratio':>6s} {'loss diff':>9s}  sparse weights", flush=True
    )
    began = time.perf_counter()
    for name in args.models:
        if (name,) in rows:
            continue
        if time.perf_counter() - began > args.seconds:
            rows.add({"model": name, "error": f"not run: {args.seconds:.0f} s had passed"})
            continue
        try:
            row = compare(name, Sizes(args.tokens, args.tiny), options, args.turns, args.steps)
            print(
                f"{name:16s} {row['dense_ms']:9.2f} {row['sparse_ms']:9.2f} {row['ratio']:6.3f} "
                f"{row['relative_loss_difference']:9.2e}  {row['sparse_weights']:3d}  ({row['wall_s']:.0f} s)",
                flush=True,
            )
        except Exception as error:
            traceback.print_exc()
            row = {"model": name, "error": f"{type(error).__name__}: {str(error)[:500]}"}
        rows.add(row)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    slower = [row["model"] for row in rows.rows if row.get("slower")]
    failed = [row["model"] for row in rows.rows if "error" in row]
    print(f"slower than dense: {', '.join(slower) or 'none'}; failed: {', '.join(failed) or 'none'}")


if __name__ == "__main__":
    main()
