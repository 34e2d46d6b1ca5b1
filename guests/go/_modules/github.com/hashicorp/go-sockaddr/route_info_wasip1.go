package sockaddr

import "errors"

var errNoRoute = errors.New("a child operator has no network interface")

// NewRouteInfo finds no routes.
func NewRouteInfo() (routeInfo, error) { return routeInfo{}, errNoRoute }

// GetDefaultInterfaceName finds no interface.
func (routeInfo) GetDefaultInterfaceName() (string, error) { return "", errNoRoute }
