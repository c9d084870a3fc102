"""File names of the small model, the same as those of the published models."""

DIT = "diffusion_pytorch_model.safetensors"
CONFIG = "config.json"
VAE = "Wan2.1_VAE.safetensors"
T5 = "models_t5_umt5-xxl-enc-bf16.safetensors"
TOKENIZER = "google/umt5-xxl"
