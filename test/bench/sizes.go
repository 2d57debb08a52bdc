package main

import "time"

// sizes are how much is measured.
type sizes struct {
	readRounds, readsARound int
	readBurst               time.Duration

	due, dueRounds int // roles that are due at once
	engineDue      int // of Vault's database engine, which is slow

	roles      []int // mounts of so many
	scaleTries int

	secrets        int // of one service
	deliveryRounds int

	rotationRounds, rotationsARound int
}

func full() sizes {
	return sizes{
		readRounds: 15, readsARound: 300, readBurst: 1500 * time.Millisecond,
		due: 1000, dueRounds: 5, engineDue: 60,
		roles: []int{10, 1000, 10000, 100000}, scaleTries: 5,
		secrets: 10, deliveryRounds: 3,
		rotationRounds: 10, rotationsARound: 60,
	}
}

// tiny shows that everything works, and says nothing about how fast.
func tiny() sizes {
	return sizes{
		readRounds: 2, readsARound: 5, readBurst: 50 * time.Millisecond,
		due: 20, dueRounds: 2, engineDue: 2,
		roles: []int{3, 20}, scaleTries: 2,
		secrets: 2, deliveryRounds: 1,
		rotationRounds: 2, rotationsARound: 3,
	}
}
