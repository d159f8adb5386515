"""SegSR, a reconstruction: super-resolution and segmentation denoise together (after Xiao et al., arXiv 2412.02960).

No code or full text of the method is public. What is here was rebuilt from its abstract and figure captions; no figure
of the paper is claimed for it.
"""
