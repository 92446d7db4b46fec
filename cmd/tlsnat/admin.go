// SPDX-License-Identifier: Apache-2.0

package main

import "github.com/tlsnat/tlsnat/gateway"

type adm struct{}

func startAdmin(s gateway.Settings, g *gateway.Gateway) (*adm, error) { return &adm{}, nil }
func (a *adm) Close() error                                          { return nil }
func (a *adm) address() string                                       { return "" }
