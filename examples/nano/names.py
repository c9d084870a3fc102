"""What the files of the small model are called, as the published ones are."""

DIT = "diffusion_pytorch_model.safetensors"
CONFIG = "config.json"
VAE = "Wan2.1_VAE.safetensors"
T5 = "models_t5_umt5-xxl-enc-bf16.safetensors"
TOKENIZER = "google/umt5-xxl"
