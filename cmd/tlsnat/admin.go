// SPDX-License-Identifier: Apache-2.0

package main

import (
	"github.com/tlsnat/tlsnat/gateway"
	"github.com/tlsnat/tlsnat/gateway/admin"
	"github.com/tlsnat/tlsnat/gateway/config"
)

// startAdmin starts the admin beside the gateway; with TLSNAT_ADMIN=off it is nil, which does nothing.
func startAdmin(s config.Settings, g *gateway.Gateway) (*admin.Server, error) {
	return admin.Start(s, g, buildVersion())
}

// apiCall is a drain that was asked for by POST /api/v1/drain.
type apiCall struct{}

func (apiCall) String() string { return "POST /api/v1/drain" }
