"""Images and masks: from disk, or synthetic; and their random changes. Nothing here knows what a network is."""
