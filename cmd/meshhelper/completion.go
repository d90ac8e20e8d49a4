package main

import (
	"github.com/spf13/cobra"
)

// bashHelpers are what cobra's script for bash takes from the package bash-completion,
// for a bash without it, a Mac's for one: the words before the cursor, which bash splits
// at = and :, what stands before the last colon of a proposal, and files.
const bashHelpers = `# The package bash-completion isn't needed: these stand in for what is used of it.
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

// addCompletion adds cobra's command `completion`, whose script for bash works without
// the package bash-completion here.
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
			shell.Long = `Print the completion script for bash. It needs no other package.

For this shell:      source <(meshhelper completion bash)
For every new one:   meshhelper completion bash > /etc/bash_completion.d/meshhelper
                     or add the line above to ~/.bashrc`
			shell.RunE = func(c *cobra.Command, _ []string) error {
				a.sayWhole(bashHelpers)
				bare, err := c.Flags().GetBool("no-descriptions")
				if err != nil {
					return err
				}
				return root.GenBashCompletionV2(a.stdout, !bare)
			}
		}
	}
}
