"""How several processes share the work of the generator."""

from dataclasses import dataclass

from wan_train.cli import option


@dataclass(frozen=True)
class ParallelSettings:
    """Several processes."""

    ulysses_size: int = option(
        1,
        "Number of processes that split the tokens of each pass, with an all-to-all around attention; it divides the"
        " number of attention heads.",
        minimum=1,
        maximum=1024,
    )
    ring_size: int = option(
        1,
        "Number of processes that pass keys and values around a ring during attention.",
        minimum=1,
        maximum=1024,
    )
    cfg_size: int = option(
        1,
        "2 computes the prompt and the negative prompt on two halves of the processes.",
        minimum=1,
        maximum=2,
    )
    data_parallel: int = option(
        1,
        "Number of groups of processes that share out the videos of --from_file; each group makes a video with"
        " --ulysses_size x --ring_size x --cfg_size processes.",
        minimum=1,
        maximum=1024,
    )
    dit_fsdp: bool = option(False, "Shard the DiT's blocks over the processes that share a video's tokens (FSDP2).")
    t5_fsdp: bool = option(
        False, "Shard the text encoder's blocks over the processes that make a video together (FSDP2)."
    )
    vae_parallel: bool = option(
        False, "Encode and decode strips of the frames, one on each process of a group, with overlapping borders."
    )
