"""Which files are pictures and which are clips, by their names."""

PICTURE_SUFFIXES = frozenset(
    ".apng .avif .bmp .dib .ico .jfif .jp2 .jpe .jpeg .jpg .jpx .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp".split()
)
CLIP_SUFFIXES = frozenset(".3gp .avi .flv .gif .m4v .mkv .mov .mp4 .mpeg .mpg .ogv .webm .wmv".split())
