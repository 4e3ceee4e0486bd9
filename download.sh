#!/usr/bin/env bash
# Download GPT-2's vocabulary and the published C4 set of 100M tokens, with its validation set, into data/.
#   bash download.sh [--dir DIR] [--help]
# The same command skips complete files and resumes interrupted ones. A file gets its name only if its size is right,
# its hash too if one is known, and a .bin has the length that its .idx gives. A relative DIR is inside this clone.
# Environment:
#   DRY_RUN=1         print the files to download, with URLs and sizes
#   GPT2_URL, C4_URL  other base URLs, such as a mirror's
#   MANIFEST=FILE     download other files, one a line: NAME URL BYTES SHA256 [LIST], with - for unknown values;
#                     a .bin comes after its .idx, and LIST is the file to write for --train-data-path-file
# Exit codes: 0 all files are complete; 1 a download failed; 2 wrong arguments, or a tool is missing.
set -euo pipefail
cd "$(dirname "$0")"

fail() {
    echo "error: $1" >&2
    exit 2
}

directory=data
while (($#)); do
    case "$1" in
        --dir) directory=${2:-}; [[ -n "$directory" ]] || fail "download.sh --dir: needs a folder"; shift 2 ;;
        --help) sed -n '2,11s/^# \?//p' "${0##*/}"; exit 0 ;;
        *) fail "download.sh $1: unknown flag; --help lists them" ;;
    esac
done
for tool in curl python3 sha256sum; do
    command -v "$tool" >/dev/null || fail "$tool: not found; install it and run this again"
done

# The sizes follow from the published counts of documents and tokens; the token count of the validation set and the hashes
# of the C4 files are not known, so that a wrong byte inside a .bin of the right size is not detected.
table() {
    local gpt2=${GPT2_URL:-https://huggingface.co/openai-community/gpt2/resolve/main}
    local c4=${C4_URL:-https://huggingface.co/datasets/ZahlenReal/diffusion_data_constraint_quickstart/resolve/main}
    local train=gpt2tok_c4_100_text_document valid=gpt2tok_c4_val_text_document
    # a MANIFEST from Windows may have a byte order mark and carriage returns
    cat "${MANIFEST:--}" <<END | LC_ALL=C sed $'1s/^\xef\xbb\xbf//; s/\r$//'
gpt2-vocab.json $gpt2/vocab.json 1042301 196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783
gpt2-merges.txt $gpt2/merges.txt 456318 1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5
$train.idx $c4/$train.idx $((34 + 12 * 208931 + 8 * 208932)) -
$train.bin $c4/$train.bin $((2 * 99952399)) - train_c4_100m.txt
$valid.idx $c4/$valid.idx $((34 + 12 * 364608 + 8 * 364609)) -
$valid.bin $c4/$valid.bin - - val_c4.txt
END
}

# Print the length of a .bin by its .idx; fail if the index is invalid (its format: megatron/data/index_file.py).
bytes_by_index() {
    python3 - "$1" 2>/dev/null <<'END'
import struct, sys
index = open(sys.argv[1], "rb").read()
magic, version, code, count, boundaries = struct.unpack_from("<9sQBQQ", index)
width = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}[code]
sizes = struct.unpack_from(f"<{count}i", index, 34)
end = struct.unpack_from("<q", index, 34 + 12 * count - 8)[0] + sizes[-1] * width
complete = (magic, version, len(index)) == (b"MMIDIDX\0\0", 1, 34 + 12 * count + 8 * boundaries)
print(end if complete and end == sum(sizes) * width else sys.exit(1))
END
}

# Print the fault of FILE BYTES SHA256; nothing if it is complete.
fault() {
    local name=${1%.partial} size expected hash=-
    size=$(wc -c <"$1")
    [[ "$3" == - ]] || read -r hash _ < <(sha256sum <"$1")
    if [[ "$2" != - && "$size" != "$2" ]]; then
        echo "has $size bytes, expected $2"
    elif [[ "$hash" != "$3" ]]; then
        echo "has sha256 $hash, expected $3"
    elif [[ "$name" == *.idx ]]; then
        bytes_by_index "$1" >/dev/null || echo "is not a valid Megatron index"
    elif [[ "$name" == *.bin ]]; then
        expected=$(bytes_by_index "${name%.bin}.idx")
        [[ "$size" == "$expected" ]] || echo "has $size bytes, and its .idx gives $expected"
    fi
}

# Download URL to FILE; each attempt resumes the one before, and an error that cannot change ends them.
curl=(curl --fail --location --connect-timeout 15 --speed-limit 1000 --speed-time 30 --continue-at -)
[[ -t 2 ]] && curl+=(--progress-bar) || curl+=(--silent)
fetch() {
    local try code output
    for try in 1 2 3 4; do
        output=$("${curl[@]}" --write-out '%{http_code} %{errormsg}' --output "$2" "$1") && return
        code=$?
        case "$code $output" in
            33* | "22 416"*) rm -f "$2" ;; # the server cannot resume: from the start
            16* | 18* | 52* | 55* | 56* | 92* | "28 2"* | "22 408"* | "22 429"* | "22 5"*) sleep "$try" ;;
            *) break ;;
        esac
    done
    output=${output#* } # empty if curl is too old for errormsg
    why="$1: ${output:-curl exited with code $code}"
    return 1
}

# Download FILE from URL with BYTES and SHA256 unless it is complete; return 1 and set `why` if that fails.
obtain() {
    local partial=$1.partial resumed=
    why="needs a valid ${1%.bin}.idx first"
    [[ "$1" != *.bin ]] || bytes_by_index "${1%.bin}.idx" >/dev/null || return 1
    if [[ -e "$1" ]]; then
        why=$(fault "$1" "${@:3}")
        [[ -n "$why" ]] || { echo "$1: complete"; return; }
        why+="; it was not touched: remove it and run this again"
        return 1
    fi
    [[ ! -s "$partial" ]] || resumed=", resumed"
    echo "$1: downloading from $2$resumed"
    fetch "$2" "$partial" || return 1
    why=$(fault "$partial" "${@:3}")
    [[ -n "$why" ]] || { mv "$partial" "$1"; return; }
    rm "$partial"
    [[ -z "$resumed" ]] || { obtain "$@"; return; } # it may have been a part of another file
    why+="; it was removed: run this again; if this repeats, $2 is not the published file"
    return 1
}

rows=$(table 2>/dev/null) || fail "MANIFEST=$MANIFEST: cannot be read"
failures=()
while read -r name address bytes sha256 list; do
    [[ -n "$name" && "$name" != \#* ]] || continue
    [[ "$bytes" =~ ^([0-9]+|-)$ && -n "$sha256" ]] || fail "MANIFEST=$MANIFEST: $name: --help has the form of a line"
    file=$directory/$name
    if [[ "${DRY_RUN:-0}" == 1 ]]; then
        [[ -e "$file" ]] || echo "would download $file (${bytes/#-/unknown} bytes) from $address"
        continue
    fi
    mkdir -p "$directory"
    obtain "$file" "$address" "$bytes" "$sha256" || { failures+=("$file: $why"); continue; }
    [[ -z "$list" ]] || echo "1.0 ${file%.bin}" >"$directory/$list" # the quoted form allows no spaces in it
done <<<"$rows"
((${#failures[@]})) || exit 0
printf 'error: %s\n' "${failures[@]}" >&2
echo "Run this again: it resumes where it stopped. Or download the missing files on another machine (DRY_RUN=1 prints" \
    "names and URLs) and copy them to $directory/." >&2
exit 1
