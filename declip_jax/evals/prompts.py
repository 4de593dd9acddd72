"""Prompt templates for zero-shot classification; `{}` stands for the class name."""

# Wordings that suit photographs of anything. A benchmark with published prompts of its own
# (ImageNet's 80, for one) has them in its config instead.
GENERAL = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a blurry photo of a {}.",
    "a black and white photo of a {}.",
    "a bright photo of a {}.",
    "a dark photo of a {}.",
    "a close-up photo of a {}.",
    "a photo of a small {}.",
    "a photo of a large {}.",
)
