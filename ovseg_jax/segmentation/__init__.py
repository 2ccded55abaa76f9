"""Zero-shot segmentation: from affinities, groups and class words to label maps."""
