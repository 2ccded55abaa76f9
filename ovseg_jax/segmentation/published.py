"""How the published models of this family are evaluated."""

from ovseg_jax.segmentation.protocol import Protocol

# Below these a pixel is background. Where the paper has other values (VOC 2012: 0.9), these are
# what the published numbers were computed with. ADE20K has no background.
THRESHOLDS = {"voc": 0.95, "context": 0.35, "coco_object": 0.9}
GROUPVIT_THRESHOLDS = {"voc": 0.95, "context": 0.35, "coco_object": 0.95}


def released_protocol(scale: float | None = None) -> Protocol:
    """The rule of the released OVSegmentor (and of GroupViT before it).

    One group for each pixel of a window; probabilities times those among the window's five most
    likely classes; a background threshold that never exceeds the window's best probability; one
    template, averaged before the norm; images resized without antialiasing.

    Args:
      scale: inverse temperature; None takes what the model learned.
    """
    return Protocol(
        name="released",
        short_side=448,
        long_limit=2048,
        window=448,
        stride=224,
        scale=scale,
        threshold=THRESHOLDS["voc"],
        thresholds=dict(THRESHOLDS),
        order="upsample_first",
        templates=("a photo of a {}.",),
        affinity="binding",
        grouping="one_group",
        image_classes=5,
        cap_threshold=True,
        average="raw",
        resize="four_pixels",
        grid="rounded_patch",
    )


def groupvit_protocol(scale: float | None = None) -> Protocol:
    """GroupViT's rule: that of `released_protocol`, with other thresholds."""
    return released_protocol(scale).replace(
        name="groupvit",
        threshold=GROUPVIT_THRESHOLDS["voc"],
        thresholds=dict(GROUPVIT_THRESHOLDS),
    )
