"""The table of cases.

A case of the ordinary suite may combine options, as long as a fault can be attributed; the others are marked slow.
"""

from tests.device.cases import QUANTISED, Case, caching, generating, training
from tests.device.workshop import CLIPS, FOUR, PRIOR, PROMPTS, SCALED, VIDEO
from tests.tiny.images import FIRST, LAST
from tests.tiny.make import T5, VAE

FULL = "networks.full"
GC, SWAP = "--gradient_checkpointing", "--blocks_to_swap"
OFFLOAD = (GC, "--gradient_checkpointing_cpu_offload")
FP8 = ("--fp8_base", "--fp8_scaled")
PREVIEWS = ("--vae", f"FOLDER/{VAE}", "--t5", f"FOLDER/{T5}", "--sample_prompts", f"FOLDER/{PROMPTS}")
PREVIEWS += ("--sample_every_n_steps", 2)
VALIDATION = ("--validation_split", 0.34, "--validate_every_n_steps", 2)
TILES = ("--vae_tiling", "--vae_tile_size", 4, "--vae_tile_overlap", 2, "--vae_cache_cpu")
EXPERTS = ("--expert_steps", 1, "--timestep_sampling", "shift", "--discrete_flow_shift", 8)
IMAGE, LAST_IMAGE = ("--image_path", f"FOLDER/{FIRST}"), ("--end_image_path", f"FOLDER/{LAST}")
CONTROL, REFERENCE = ("--control_path", f"FOLDER/{CLIPS}/{VIDEO}"), ("--reference_image", f"FOLDER/{FIRST}")
VACE = ("--vace_video", f"FOLDER/{CLIPS}/{VIDEO}", "--vace_reference", f"FOLDER/{FIRST}")
AVERAGE = ("--ema_decay", 0.9)

PLAIN = ("--infer_steps", 1, "--guidance_scale", 1)

# Two steps of training and one video of each kind of task, and with them each way to save memory or time.
ORDINARY: dict[str, Case] = {
    "train t2v, previews": training(*PREVIEWS, *VALIDATION),
    "train t2v, float32": training("--optimizer_args", "fused=false", precision="no", within=0.0),
    "train i2v, activations offloaded": training(*OFFLOAD, "--image_dropout_rate", 0.5, task="i2v-14B"),
    "train flf2v, int8": training("--int8_base", task="flf2v-14B", within=QUANTISED),
    "train ti2v, fp8": training("--fp8_base", task="ti2v-5B"),
    "train A14B, expert offloaded": training(*EXPERTS, "--offload_inactive_dit", GC, task="t2v-A14B", steps=3),
    "train fun-control, 8-bit states": training(
        "--control_dropout_rate", 0.5, "--optimizer_type", "AdamW8bitSR", task="fun-control-1.3B"
    ),
    "train fun-camera, compiled": training(GC, "--compile", "--compile_backend", "eager", task="fun-camera-1.3B"),
    "train vace, fp8 scaled streamed": training(*FP8, GC, SWAP, 2, task="vace-1.3B"),
    "train t2v, all blocks streamed": training(
        *("--recompute", "keep_attention", "--gradient_checkpointing_cpu_offload", "--ffn_chunks", 2),
        *(SWAP, 3, "--block_swap_ring_size", 2),
        dit=FOUR,
    ),
    "train all weights, streamed both ways": training(
        *(GC, SWAP, 1, "--fused_backward_pass", "--optimizer_type", "AdamW8bitSR", "--optimizer_cpu_offload"),
        *("--full_bf16", *AVERAGE, "--ema_cpu"),
        network=FULL,
    ),
    "resume, states offloaded": training(
        *("--resume", "OUT/run-step00000001-state", "--optimizer_type", "adamw", "--optimizer_cpu_offload"),
        *("--save_state", "--save_every_n_steps", 1),
        before=training("--save_state", "--save_every_n_steps", 1, "--optimizer_type", "adamw"),
    ),
    "generate t2v": generating(),
    "generate i2v, in tiles": generating(*IMAGE, *PLAIN, *TILES, task="i2v-14B"),
    "generate flf2v, teacache": generating(
        *(*IMAGE, *LAST_IMAGE, *PLAIN, "--infer_steps", 4, "--step_cache", "teacache", "--tea_cache_l1_thresh", 0.3),
        task="flf2v-14B",
    ),
    "generate ti2v, noise of the device": generating(
        *IMAGE, *PLAIN, "--rand_device", "cuda", task="ti2v-5B", within=None
    ),
    "generate A14B, attention cache": generating(
        *("--guidance_scale", 1, "--infer_steps", 4, "--step_cache", "attention", "--start_step", 1),
        *("--attentioncache_interval", 2, "--end_step", 4),
        task="t2v-A14B",
        length=1,
    ),
    "generate fun-control, int8": generating(
        *CONTROL, *REFERENCE, *PLAIN, "--int8", task="fun-control-1.3B", length=1, within=QUANTISED
    ),
    "generate fun-camera, fp8 products": generating(
        *(*IMAGE, "--camera_direction", "Left", *PLAIN, "--fp8", "--fp8_scaled", "--fp8_fast", SWAP, 1, "--fp8_t5"),
        task="fun-camera-1.3B",
        within=QUANTISED,
    ),
    "generate vace, sliding windows": generating(
        *VACE, *PLAIN, "--sliding_window_size", 2, "--sliding_window_stride", 1, task="vace-1.3B", length=9
    ),
    "cache captions, fp8": caching("t2v-1.3B", "--fp8_t5", clips=False),
}
# The other options that have to do with a device.
MATRIX: dict[str, Case] = {
    "train i2v-A14B": training(*EXPERTS, task="i2v-A14B"),
    "generate i2v-A14B": generating(*IMAGE, *PLAIN, task="i2v-A14B"),
    "train A14B": training(*EXPERTS, *VALIDATION, task="t2v-A14B"),
    "train A14B, streamed": training(*EXPERTS, SWAP, 1, GC, task="t2v-A14B", steps=4),
    "train A14B, one LoRA": training(*EXPERTS, "--shared_lora", task="t2v-A14B"),
    "train i2v-14B-FC": training(task="i2v-14B-FC"),
    "train fun-control-A14B": training(*EXPERTS, task="fun-control-A14B"),
    "train fun-camera-A14B": training(*EXPERTS, task="fun-camera-A14B"),
    "train fun-inp-A14B": training(*EXPERTS, task="fun-inp-A14B"),
    "train vace-fun-A14B": training(*EXPERTS, task="vace-fun-A14B"),
    "float16": training(precision="fp16"),
    "recompute": training(GC),
    "keep_attention": training("--recompute", "keep_attention"),
    "streamed, previews": training(GC, SWAP, 3, *PREVIEWS, *VALIDATION, dit=FOUR),
    "fp8 file, streamed": training("--fp8_base", GC, SWAP, 3, dit=SCALED),
    "fp8 scaled, previews": training(*FP8, *PREVIEWS),
    "int8 with ffn.2, streamed": training("--int8_base", "--int8_ffn2", GC, SWAP, 3, dit=FOUR, within=QUANTISED),
    "accumulated": training("--gradient_accumulation_steps", 2),
    "scaled norms": training("--scale_weight_norms", 0.01),
    "average on the device": training(*AVERAGE, "--sample_with_ema", *PREVIEWS),
    "average on the host": training(*AVERAGE, "--ema_cpu", "--sample_with_ema", *PREVIEWS),
    "prior": training("--prior_captions", f"FOLDER/{PRIOR}", "--prior_loss_weight", 0.5, "--t5", f"FOLDER/{T5}"),
    "huber": training("--loss_type", "huber", "--timestep_sampling", "sigma", "--weighting_scheme", "sigma_sqrt"),
    "Adafactor": training("--optimizer_type", "Adafactor"),
    "Prodigy": training("--optimizer_type", "Prodigy", "--learning_rate", 1),
    "CAME": training("--optimizer_type", "CAME", "--learning_rate", 1e-4),
    "schedule-free": training("--optimizer_type", "AdamWScheduleFree", *PREVIEWS),
    "AdamW8bit": training("--optimizer_type", "AdamW8bit"),
    "SGD": training("--optimizer_type", "SGD", "--optimizer_args", "momentum=0.9"),
    "all weights": training(GC, network=FULL),
    "all weights, fused": training(
        GC, "--fused_backward_pass", "--optimizer_type", "AdamW8bitSR", "--full_bf16", network=FULL
    ),
    "all weights, streamed": training(GC, SWAP, 3, "--optimizer_type", "adamw", network=FULL, dit=FOUR),
    "all weights, states offloaded": training(GC, "--optimizer_cpu_offload", "--optimizer_type", "adamw", network=FULL),
    "some weights": training("--trainable", "head.*", "blocks.1.*", network=FULL),
    "all weights of A14B, fused": training(
        *EXPERTS, GC, "--fused_backward_pass", "--optimizer_type", "adamw", network=FULL, task="t2v-A14B"
    ),
    "compiled by aot_eager": training("--compile", "--compile_backend", "aot_eager"),
    "generate one frame": generating(length=1),
    "generate streamed": generating(SWAP, 3, dit=FOUR),
    "generate, guidance": generating("--sample_solver", "dpm++", "--slg_layers", "1", "--slg_end", 1.0),
    "generate, merged guidance": generating("--sample_solver", "lcm", "--cfg_merge"),
    "generate i2v-14B-FC": generating(*IMAGE, *CONTROL, task="i2v-14B-FC"),
    "generate fun-control-A14B": generating(*CONTROL, task="fun-control-A14B"),
    "generate fun-inp-A14B": generating(*IMAGE, task="fun-inp-A14B"),
    "generate vace-fun-A14B": generating("--vace_video", VACE[1], task="vace-fun-A14B"),
    "cache clips, in tiles": caching("i2v-14B", *TILES),
    "cache ti2v": caching("ti2v-5B"),
}
CASES = ORDINARY | MATRIX
