#!/usr/bin/env bash
# Stands in for gcloud: notes each call in $CALLS; the run of the first slice ends with the exit
# codes in $CODES, one a line, one slice after the other. A slice is there from its creation to its
# deletion; while $STATES has lines, they are what is said of it. REFUSE=true refuses to create.
printf '%s\n' "$(printf '%s ' "$@" | tr '\n' ' ')" >>"$CALLS"
slice=$CODES.slice
case "$*" in
*"queued-resources create"*)
    [ "${REFUSE:-}" != true ] || exit 1
    [ ! -e "$slice" ] || exit 1 # it exists
    touch "$slice"
    ;;
*"queued-resources delete"*) rm "$slice" || exit 1 ;;
*describe*)
    [ -e "$slice" ] || exit 1
    state=$(head -n 1 "$STATES")
    sed -i 1d "$STATES"
    [ "$state" != lost ] || exit 1 # the question, not the slice
    echo "${state:-ACTIVE}"
    ;;
*exit_code\)*) # follows the run's log
    code=$(head -n 1 "$CODES")
    sed -i 1d "$CODES"
    echo "$code" >"$CODES.last"
    [ "$code" = 0 ] || exit 1
    ;;
*"cat ~/exit_code"*)
    code=$(cat "$CODES.last")
    [ "$code" != gone ] || exit 255
    echo "$code"
    ;;
esac
