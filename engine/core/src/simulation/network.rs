//! Connections between gateways and nodes: each way a queue whose items arrive in order, late, or never.
//!
//! A path that is blocked holds back what is under way, as the kernel that goes on resending: when it is
//! open again that arrives, also after whoever sent it has given the connection up, or died.

use crate::wire::Frame;
use crate::wire::messages::HelloReply;
use std::collections::VecDeque;

/// What travels.
#[derive(Clone, Debug)]
pub enum Item {
    Hello,
    Greeting(HelloReply),
    Frame(Frame),
    Ping,
    Pong,
    /// The end of the stream, or a reset.
    Close,
}

/// Which way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    ToNode,
    ToGateway,
}

/// One way of a connection.
#[derive(Default)]
pub struct Pipe {
    items: VecDeque<(u64, Item)>,
    /// A delivery of the first item is due.
    pub scheduled: bool,
}

impl Pipe {
    /// Sends an item that takes until `due_ns`, or longer behind others; gives when it arrives.
    pub fn push(&mut self, due_ns: u64, item: Item) -> u64 {
        let due_ns = self.items.back().map_or(due_ns, |(last, _)| due_ns.max(*last));
        self.items.push_back((due_ns, item));
        due_ns
    }

    pub fn pop(&mut self) -> Option<Item> {
        self.items.pop_front().map(|(_, item)| item)
    }

    /// When the first item arrives.
    pub fn next_due_ns(&self) -> Option<u64> {
        self.items.front().map(|(due, _)| *due)
    }

    pub fn len(&self) -> usize {
        self.items.len()
    }

    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// The sender is gone with what it had not handed to the network.
    pub fn truncate(&mut self, keep: usize) {
        self.items.truncate(keep);
    }
}

/// A connection of one run of a gateway to one run of a node.
pub struct Connection {
    pub gateway: usize,
    pub gateway_run: u64,
    pub node: usize,
    /// None: the node has not taken it yet.
    pub node_run: Option<u64>,
    pub gateway_open: bool,
    pub node_open: bool,
    pub to_node: Pipe,
    pub to_gateway: Pipe,
}

impl Connection {
    pub fn pipe(&mut self, way: Way) -> &mut Pipe {
        match way {
            Way::ToNode => &mut self.to_node,
            Way::ToGateway => &mut self.to_gateway,
        }
    }

    /// Nothing more will come of it.
    pub fn is_over(&self) -> bool {
        let to_node = self.node_open || !self.to_node.is_empty();
        let to_gateway = self.gateway_open || !self.to_gateway.is_empty();
        !to_node && !to_gateway
    }
}
