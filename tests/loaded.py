"""What the server of `tests/processes.py` loads before it forks: all that the commands import sooner or later."""

import gc

import bitsandbytes
import torch.utils.tensorboard
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from transformers import get_scheduler

import cache_tools.cache_latents
import cache_tools.cache_text_encoder_outputs
import generate.main
import networks.tools.convert
import wan_train.models.encoders.image
import wan_train.training.main

__all__ = ["DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"]
__all__ += ["bitsandbytes", "cache_tools", "generate", "get_scheduler", "networks", "torch", "wan_train"]

gc.collect()
gc.freeze()  # a collection in a forked process would copy every page of it
