"""What is recognised: tags, boxes, masks, and how well a tagger sees through degradation."""
