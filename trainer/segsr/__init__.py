"""Training of SegSR, a reconstruction: recipes, labels, the joint loss, drawn scenes and the proof in small."""
