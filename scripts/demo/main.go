// Command demo plays the main job of this engine against private servers: a
// real Vault rotates the password of a live Redis while clients log in. It
// checks everything it says and exits non-zero when something is not as
// claimed. With -k8s the story is one of a Kubernetes cluster, whose pods follow
// a rotation. With -dev it only starts the servers and leaves them running.
//
//	main.go     flags, signals, exit status
//	scenes.go   the story, scene by scene
//	stage.go    the servers, and what a user types at them
//	k8s_*.go    the same of the story of a Kubernetes cluster
//	target.go   where clients log in: Redis, or a service with an API key
//	pool.go     the clients
//	screen.go   what is printed
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	dev := flag.Bool("dev", false, "start the servers and leave them running until Ctrl-C")
	k8s := flag.Bool("k8s", false, "show how a rotation reaches the pods of a Kubernetes cluster")
	transcript := flag.String("transcript", "", "also write what is printed to this `file`, without colour")
	flag.Parse()
	perform := play
	switch {
	case *dev && *k8s:
		fmt.Fprintln(os.Stderr, "-dev and -k8s are two different shows: give one of them")
		os.Exit(2)
	case *dev:
		perform = develop
	case *k8s:
		perform = playCluster
	}
	os.Exit(run(perform, *dev, *transcript))
}

func run(perform func(context.Context, *screen) error, dev bool, transcript string) (exit int) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	s := newScreen(os.Stdout)
	err := perform(ctx, s)
	if transcript != "" {
		err = errors.Join(err, os.WriteFile(transcript, []byte(s.transcript()), 0o600))
	}
	switch {
	case ctx.Err() != nil && !errors.Is(err, errLeft):
		fmt.Fprintln(os.Stderr, "\nstopped; nothing is left running")
		if dev {
			return 0
		}
		return 130
	case err != nil:
		s.failure(err)
		return 1
	}
	return 0
}
