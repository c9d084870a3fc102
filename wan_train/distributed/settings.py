"""Options for generation with several processes."""

from dataclasses import dataclass

from wan_train.cli import option


@dataclass(frozen=True)
class ParallelSettings:
    """Several processes."""

    ulysses_size: int = option(
        1,
        "Number of processes for Ulysses sequence parallelism; must divide the number of attention heads.",
        minimum=1,
        maximum=1024,
    )
    ring_size: int = option(
        1,
        "Number of processes for ring attention.",
        minimum=1,
        maximum=1024,
    )
    cfg_size: int = option(
        1,
        "Number of processes for CFG parallelism; 2 computes the prompt and the negative prompt on two halves"
        " of the processes.",
        minimum=1,
        maximum=2,
    )
    data_parallel: int = option(
        1,
        "Number of process groups that share the prompts of --from_file; each group has --ulysses_size x "
        "--ring_size x --cfg_size processes.",
        minimum=1,
        maximum=1024,
    )
    dit_fsdp: bool = option(False, "Shard the DiT's blocks over the sequence-parallel processes (FSDP2).")
    t5_fsdp: bool = option(False, "Shard the text encoder's blocks over the processes of a group (FSDP2).")
    vae_parallel: bool = option(
        False, "Split VAE encoding and decoding into strips of rows with halos, one per process of a group."
    )
