#!/bin/sh
# The clips, and frames of them as ffmpeg 5.1 shows them. Needs ffmpeg with libx264 and libx265.
set -e
cd "$(dirname "$0")"
run() { ffmpeg -loglevel error -y "$@"; }
source="testsrc2=size=96x64:rate=8:duration=3"
run -f lavfi -i $source -vf "scale=out_color_matrix=bt709:out_range=tv,format=yuv420p" \
    -colorspace bt709 -color_primaries bt709 -color_trc bt709 -color_range tv -c:v libx264 -g 10 -bf 3 -crf 24 clip.mp4
run -i clip.mp4 -metadata:s:v rotate=90 -c copy turned.mp4
run -f lavfi -i $source -pix_fmt yuv420p -c:v libx265 -x265-params log-level=none hevc.mp4
for name in clip turned; do
    run -i $name.mp4 -vf "select='eq(n,0)+eq(n,11)+eq(n,23)'" -fps_mode passthrough \
        -sws_flags neighbor+accurate_rnd+full_chroma_int -pix_fmt rgb24 $name-%d.png
done
