package main

// Lines that a test adds to the helper's source, so that the helper waits at a step of
// the host to be killed or inspected there.

import (
	"bufio"
	"fmt"
	"net"
	"os"
)

// awaitStep returns an Options.Step that tells the name of each step on the socket
// TRIAL_STEPS and goes on when a byte comes back. Only the helper that the trial
// builds for itself has it.
func awaitStep() func(string) {
	conn, err := net.Dial("unix", os.Getenv("TRIAL_STEPS"))
	if err != nil {
		fmt.Fprintln(os.Stderr, "steps:", err)
		os.Exit(1)
	}
	answers := bufio.NewReader(conn)
	return func(name string) {
		fmt.Fprintln(conn, name)
		if _, err := answers.ReadByte(); err != nil {
			select {} // the test answers no more: wait to be killed
		}
	}
}
