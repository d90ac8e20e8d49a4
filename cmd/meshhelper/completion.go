package main

import (
	"github.com/spf13/cobra"
)

// bashHelpers stand in for the three functions that cobra's bash script calls from the
// package bash-completion, which macOS and minimal Linux systems don't have. They run with
// the bash 3.2 of macOS, and do nothing if the package is loaded.
//
//   - _get_comp_words_by_ref splits the line at spaces only. Bash itself also splits at
//     the characters of COMP_WORDBREAKS, which include = and :, and so at each colon of an
//     IPv6 address.
//   - __ltrim_colon_completions removes from each proposal the part up to the last colon,
//     because bash replaces only the text after it.
//   - _filedir proposes files, or with -d folders.
const bashHelpers = `# Stand-ins for the functions of the package bash-completion, which isn't needed.
if ! declare -F _get_comp_words_by_ref >/dev/null; then
    _get_comp_words_by_ref() {
        local IFS=$' \t\n' line=${COMP_LINE:0:COMP_POINT}
        read -r -a words <<<"$line"
        if [[ $line == *[[:space:]] ]]; then
            words+=('')
        fi
        cword=$((${#words[@]} - 1))
        cur=${words[cword]}
        prev=
        if ((cword > 0)); then
            prev=${words[cword - 1]}
        fi
    }
fi
if ! declare -F __ltrim_colon_completions >/dev/null; then
    __ltrim_colon_completions() {
        if [[ $1 == *:* && $COMP_WORDBREAKS == *:* ]]; then
            local before=${1%"${1##*:}"} i
            for i in "${!COMPREPLY[@]}"; do
                COMPREPLY[i]=${COMPREPLY[i]#"$before"}
            done
        fi
    }
fi
if ! declare -F _filedir >/dev/null; then
    _filedir() {
        local IFS=$'\n' kind=-f
        if [[ $1 == -d ]]; then
            kind=-d
        fi
        COMPREPLY+=($(compgen "$kind" -- "$cur"))
    }
fi

`

// addCompletion adds cobra's command `completion`, with bashHelpers before the script for
// bash.
func addCompletion(a *app, root *cobra.Command) {
	root.InitDefaultCompletionCmd("completion")
	for _, c := range root.Commands() {
		if c.Name() != "completion" {
			continue
		}
		c.Args, c.RunE = cobra.ArbitraryArgs, needsCommand
		for _, shell := range c.Commands() {
			if shell.Name() != "bash" {
				continue
			}
			shell.Long = `Print the completion script for bash. It doesn't need the package bash-completion.

For this shell:      source <(meshhelper completion bash)
For every new one:   meshhelper completion bash > /etc/bash_completion.d/meshhelper
                     or add the line above to ~/.bashrc`
			shell.RunE = func(c *cobra.Command, _ []string) error {
				a.sayVerbatim(bashHelpers)
				bare, err := c.Flags().GetBool("no-descriptions")
				if err != nil {
					return err
				}
				return root.GenBashCompletionV2(a.stdout, !bare)
			}
		}
	}
}
