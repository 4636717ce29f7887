# Segmenter with ViT-S/16, whose mask transformer runs over the tokens, too. Not measured yet.
#   mim train mmsegmentation \
#       configs/msvit/segmenter_msvit-s_token-mask_8xb1-160k_ade20k-512x512.py --launcher pytorch --gpus 8
_base_ = './segmenter_msvit-s_mask_8xb1-160k_ade20k-512x512.py'
model = dict(backbone=dict(out_type='tokens'), decode_head=dict(type='TokenSegmenterHead'))
