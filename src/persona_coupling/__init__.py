"""Does any LoRA fine-tuning destroy a persona's learned marker, and why?"""

__version__ = "0.1.0"
