#!/bin/sh
# Links what the image has prepared (compiled modules, the embedded model) into the caches under HOME, which may be a
# volume that is empty or of an older image, and becomes `lorikeet`.
set -eu
prepared=$(dirname "$0")/../home
cp -rsf "$(realpath "$prepared")/." "$HOME"
exec lorikeet "$@"
