package kind

import (
	"encoding/hex"
	"fmt"
	"io"
	"time"
)

// Bounds on how long consumers take at most to read what changed.
const (
	defaultPropagationDelay = 5 * time.Minute
	minPropagationDelay     = time.Second
	maxPropagationDelay     = 24 * time.Hour
)

// CompleteRing fills in the defaults that every key ring has. name is that of
// the kind.
func CompleteRing(name string, spec *Spec) error {
	switch spec.Strategy {
	case "", KeyRing:
		spec.Strategy = KeyRing
	default:
		return fmt.Errorf("strategy is %q: roles of kind %s allow %s, which is their default", spec.Strategy, name, KeyRing)
	}
	if spec.PropagationDelay == 0 {
		spec.PropagationDelay = defaultPropagationDelay
	}
	if spec.PropagationDelay < minPropagationDelay || spec.PropagationDelay > maxPropagationDelay {
		return fmt.Errorf("propagation_delay is %s: 1s to 24h are allowed", spec.PropagationDelay)
	}
	return nil
}

// keyIDBytes is enough for the ids of all keys of a mount to differ.
const keyIDBytes = 8

// RandomKeyID makes an id for a key of which nothing may be told: the digest of
// a shared secret would let anybody who sees a token's header test guesses.
func RandomKeyID(src io.Reader) (string, error) {
	raw, err := RandomBytes(src, keyIDBytes)
	return hex.EncodeToString(raw), err
}
